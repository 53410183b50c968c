package verify

// subject is what a check is about, what it expects, and what to do where that fails: for
// findings that are about no single component.
type subject struct{ component, expected, do string }

// subjects has every check of the package's table.
var subjects = map[string]subject{
	"inventory": {"the provider's inventory", "one that is signed and in force", "have the provider sign a new version of its inventory, and put it in place"},
	"host":      {"the host's entry in the inventory", "an entry whose keys and certificates are in order", "have the provider enrol the host again and sign its inventory"},
	"platform":  {"reference values of the host's release", "values of this installation's profile, in force", "examine the release and sign reference values for it: foothold platform manifest"},
	"input":     {"what the verdict is asked about", "a well-formed tunnel, settings, nonce and role", "treat who sent it, the boot server first, as suspect: see its log"},
	"quote":     {"the quoted structure", "exactly one TPMS_ATTEST that a TPM made for a quote", "treat host and boot server as suspect: see their logs"},
	"signature": {"the quote's signature", "ECDSA with SHA-256 by the host's inventoried attestation key", "another machine than the inventoried host answered: find out which; do not admit the host until then"},
	"binding":   {"the quote's qualifying data", "this role, reservation, tunnel, settings, earlier verdict and nonce", "somebody replays or relays quotes: look at the boot server and at the host's network"},
	"selection": {"the quoted registers' list", "exactly the registers of this kind of quote, SHA-256 bank", "use the host agent of the release that the tenant examined"},
	"log":       {"the host's measurement logs", "logs that can be read and consist of what the reference values name", changedPlatform},
	"policy":    {"what the tenant demands of the host", "what host_policy states", "compare the host with host_policy in the orchestrator's configuration"},
	"registers": {"the quoted registers' values", "what the reference values, this VM's settings and this tunnel lead to", changedPlatform},
	"clock":     {"the TPM's counters", "counters that go on from the last quote of this host", "start the VM again after the host's boot; if nobody booted it, find out who did"},
	"more":      {"further findings", "none", "mend what is listed first"},
}
