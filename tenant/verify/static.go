package verify

import (
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/pcr"
)

// StaticExpectation is what the tenant knows when it asks a host again what it runs:
// before unlocking, before connecting, while computing.
type StaticExpectation struct {
	Role        string        `json:"role"` // evidence.RoleUnlock, RoleConnect or RoleWatch
	Reservation string        `json:"reservation"`
	Start       int           `json:"start"`
	Host        string        `json:"host"`
	Previous    digest.SHA256 `json:"previous"` // Verdict.Digest of this start's last verdict
	Nonce       []byte        `json:"nonce"`    // ours; fresh and unused as the ledger has just found
	Clock       Clock         `json:"clock"`    // Verdict.Clock of this start's last verdict
}

// StaticEvidence is the host's answer.
type StaticEvidence struct {
	Quote    evidence.Quote    `json:"quote"`
	Platform evidence.Platform `json:"platform"`
}

// Static judges a static quote. The permission is nil unless every check held.
func (v *Verifier) Static(x StaticExpectation, e StaticEvidence) (*Admitted, Verdict) {
	verdict := v.static(x, e, v.now().UTC().Round(0), 0)
	return admit(verdict), verdict
}

func (v *Verifier) static(x StaticExpectation, e StaticEvidence, at time.Time, dropped int) Verdict {
	return v.byAny(x.Host, at, func(p *Platform) Verdict { return v.staticBy(p, x, e, at, dropped) })
}

func (v *Verifier) staticBy(p *Platform, x StaticExpectation, e StaticEvidence, at time.Time, dropped int) Verdict {
	j := v.begin(x.Role, x.Reservation, x.Start, x.Host, at, p, e.Platform, dropped)
	j.verdict.Previous = x.Previous
	if x.Role != evidence.RoleUnlock && x.Role != evidence.RoleConnect && x.Role != evidence.RoleWatch {
		j.find("input", "a static quote has no role %q", x.Role)
	}
	if x.Previous.IsZero() {
		j.find("input", "no verdict came before")
	}
	j.nonce(x.Nonce)
	static, claimed := j.readLogs(j.logs)
	j.quote(e.Quote, quoteExpectation{
		binding:   evidence.StaticBinding(x.Role, x.Reservation, x.Previous, x.Nonce),
		selection: pcr.StaticSelection(),
		static:    static,
		claimed:   claimed,
		clock:     x.Clock,
	})
	return j.end(Record{Static: &StaticRecord{x, e.Quote}})
}
