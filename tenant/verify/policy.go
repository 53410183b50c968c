package verify

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"foothold/protocol/digest"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/tcglog"
)

// Policy is what the tenant demands of a host beside the reference values of its release.
// Nothing in it can be left out of the judgement: a field without a value has the default
// that stands with it.
//
// Where a value comes from a log, only what a register proves counts: data whose digest was
// extended, and digests that the signed reference values give a meaning. An event's type,
// and data that only name what was measured, are the host's word and decide nothing.
type Policy struct {
	// Locations that the inventory may state for the host, in full or by their first parts:
	// "hall 2" allows "hall 2, row 5". In production none is allowed that is not named; a
	// lab's host may be anywhere until one is named.
	Locations []string `yaml:"locations" json:"locations,omitempty"`
	// SecureBoot is the state that the firmware's variable must prove: enabled [default] or disabled.
	SecureBoot string `yaml:"secure_boot" json:"secure_boot,omitempty"`
	// MinimumFirmware is the lowest version of the firmware, as it writes it, such as "2.19.1".
	// [any that the reference values name]
	MinimumFirmware string `yaml:"minimum_firmware" json:"minimum_firmware,omitempty"`
	// CommandLines are those that the kernel may have got, each in full. [any that the
	// reference values name]
	CommandLines []string `yaml:"command_lines" json:"command_lines,omitempty"`
	// DRTM says whether a dynamic launch must be there, and in the reference values: required
	// or not-required [default]. One that is there must be in the reference values anyhow.
	DRTM string `yaml:"drtm" json:"drtm,omitempty"`
}

// String is the policy in one line, for people.
func (p Policy) String() string {
	return fmt.Sprintf("locations %s, secure boot %s, firmware from %q, command lines %s, dynamic launch %s", orAny(p.Locations), p.SecureBoot, p.MinimumFirmware, orAny(p.CommandLines), p.DRTM)
}

func orAny(list []string) string {
	if len(list) == 0 {
		return "none stated"
	}
	return quotedList(list)
}

// Values of Policy.
const (
	SecureBootEnabled  = "enabled"
	SecureBootDisabled = "disabled"
	DRTMRequired       = "required"
	DRTMNotRequired    = "not-required"
)

// Policies are those of a provider's hosts. The zero value is the strictest: in production
// it allows no location.
type Policies struct {
	Default Policy `yaml:"default"`
	// Hosts have, by name, what differs for one host: a field with a value takes the
	// place of the default's.
	Hosts map[string]Policy `yaml:"hosts"`
}

// of is the policy of one host, complete.
func (p Policies) of(host string) Policy {
	out, own := p.Default, p.Hosts[host]
	for _, f := range []struct {
		to        *string
		own, none string
	}{
		{&out.SecureBoot, own.SecureBoot, SecureBootEnabled}, {&out.MinimumFirmware, own.MinimumFirmware, ""}, {&out.DRTM, own.DRTM, DRTMNotRequired},
	} {
		if f.own != "" {
			*f.to = f.own
		}
		if *f.to == "" {
			*f.to = f.none
		}
	}
	if len(own.Locations) > 0 {
		out.Locations = own.Locations
	}
	if len(own.CommandLines) > 0 {
		out.CommandLines = own.CommandLines
	}
	return out
}

// Check refuses policies that could not be held against a host of the profile.
func (p Policies) Check(profile string) error {
	if err := p.Default.check(profile); err != nil {
		return fmt.Errorf("host policy: default: %w", err)
	}
	for _, name := range slices.Sorted(maps.Keys(p.Hosts)) {
		if err := p.Hosts[name].check(profile); err != nil {
			return fmt.Errorf("host policy: host %s: %w", name, err)
		}
	}
	return nil
}

func (p Policy) check(profile string) error {
	switch {
	case profile == platform.Lab && (p.SecureBoot != "" || p.MinimumFirmware != "" || len(p.CommandLines) > 0 || p.DRTM != ""):
		return errors.New("in a lab nothing measures firmware and kernel: only locations can be demanded")
	case !slices.Contains([]string{"", SecureBootEnabled, SecureBootDisabled}, p.SecureBoot):
		return fmt.Errorf("secure_boot %q: want %s or %s", p.SecureBoot, SecureBootEnabled, SecureBootDisabled)
	case !slices.Contains([]string{"", DRTMRequired, DRTMNotRequired}, p.DRTM):
		return fmt.Errorf("drtm %q: want %s or %s", p.DRTM, DRTMRequired, DRTMNotRequired)
	case p.MinimumFirmware != "" && !strings.ContainsAny(p.MinimumFirmware, "0123456789"):
		return fmt.Errorf("minimum_firmware %q: it has no number that could be compared", p.MinimumFirmware)
	case slices.ContainsFunc(p.Locations, blank) || slices.ContainsFunc(p.CommandLines, blank):
		return errors.New("an empty location or command line")
	}
	return nil
}

func blank(s string) bool { return strings.TrimSpace(s) == "" }

// bootLog is a firmware's log, register by register, beside the reference values that each
// event was found to be; where it is none of them, their zero value.
type bootLog struct {
	events map[int][]tcglog.Event
	named  map[int][]platform.Event
}

// location holds the inventory's word against the policy.
func (j *judgement) location() {
	allowed, stated := j.policy.Locations, j.host.entry.Location
	if len(allowed) == 0 && j.v.profile == platform.Lab {
		return
	}
	if !slices.ContainsFunc(allowed, func(l string) bool { return stated == l || strings.HasPrefix(stated, l+",") }) {
		expected := "one that the policy allows; it names none"
		if len(allowed) > 0 {
			expected = quotedList(allowed)
		}
		j.differ("policy", "location", expected, fmt.Sprintf("%q", stated), "if the host may stand there, name it in host_policy, locations")
	}
}

// bootPolicy holds what firmware and boot loader measured against the policy.
func (j *judgement) bootPolicy(boot bootLog) {
	if j.host == nil {
		return // refused; no policy is known to be its
	}
	j.secureBoot(boot)
	if j.policy.MinimumFirmware != "" {
		j.firmwareVersion(boot)
	}
	if len(j.policy.CommandLines) > 0 {
		j.commandLine(boot)
	}
	if j.policy.DRTM == DRTMRequired {
		j.dynamicLaunch(boot)
	}
}

// Registers that policies speak of.
const (
	firmwareRegister = 0
	secureRegister   = 7
	kernelRegister   = 9
)

// secureBoot wants one variable SecureBoot before register 7's separator (TCG PC Client
// Platform Firmware Profile, section 3.3.4.8), whose content the register proves.
func (j *judgement) secureBoot(boot bootLog) {
	seen := "no variable whose content register 7 proves"
	states := 0
	for _, e := range boot.events[secureRegister] {
		if isSeparator(digest.SHA256(e.Digest(tcglog.SHA256))) {
			break
		}
		v, ok := e.Variable(tcglog.SHA256)
		if !ok || v.Vendor != tcglog.GlobalVariable || v.Name != "SecureBoot" {
			continue
		}
		states++
		switch {
		case len(v.Data) == 1 && v.Data[0] == 1:
			seen = SecureBootEnabled
		case len(v.Data) == 0 || len(v.Data) == 1 && v.Data[0] == 0:
			seen = SecureBootDisabled
		default:
			seen = "a state in another form"
		}
	}
	if states > 1 {
		seen = "more than one state"
	}
	if seen != j.policy.SecureBoot {
		j.differ("policy", "secure boot", j.policy.SecureBoot, seen, "have the provider set it in the host's firmware, or change secure_boot in host_policy")
	}
}

// firmwareVersion takes the event of register 0 that the reference values, not the log, name
// as the version.
func (j *judgement) firmwareVersion(boot bootLog) {
	want, component := j.policy.MinimumFirmware, "firmware version"
	var versions []string
	for i, e := range boot.events[firmwareRegister] {
		if tcglog.Type(boot.named[firmwareRegister][i].Type) != tcglog.CRTMVersion {
			continue
		}
		text, _ := e.Version(tcglog.SHA256)
		versions = append(versions, text)
	}
	switch {
	case len(versions) != 1:
		j.differ("policy", component, want+" or later", fmt.Sprintf("%d events that the reference values call a version", len(versions)),
			"have them made anew from a host's log, by `foothold platform manifest create`")
	case versions[0] == "":
		j.differ("policy", component, want+" or later", "a version that is no text, or not what was measured", "state no minimum_firmware for this host: its reference values alone say which firmware is good")
	default:
		order, ok := compareVersions(versions[0], want)
		if !ok {
			j.differ("policy", component, want+" or later", fmt.Sprintf("%q, which does not compare with it", versions[0]), "write minimum_firmware as this firmware writes its versions")
		} else if order < 0 {
			j.differ("policy", component, want+" or later", fmt.Sprintf("%q", versions[0]), "have the provider update the host's firmware")
		}
	}
}

// compareVersions orders two versions by their numbers, from left to right; what stands
// between the numbers must be the same in both, or they do not compare. One that goes on
// where the other ends is the later.
func compareVersions(a, b string) (order int, ok bool) {
	for a != "" && b != "" {
		x, y := run(a), run(b)
		a, b = a[len(x):], b[len(y):]
		if !digit(x[0]) || !digit(y[0]) {
			if x != y {
				return 0, false
			}
			continue
		}
		x, y = strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")
		if len(x) != len(y) {
			return len(x) - len(y), true
		}
		if order := strings.Compare(x, y); order != 0 {
			return order, true
		}
	}
	return len(a) - len(b), true
}

// run is the longest beginning of s, which is not empty, that is all digits or has none.
func run(s string) string {
	n := 1
	for n < len(s) && digit(s[n]) == digit(s[0]) {
		n++
	}
	return s[:n]
}

func digit(b byte) bool { return b >= '0' && b <= '9' }

// commandLine looks at what the kernel itself measured of the line that it got, whoever
// passed it: its EFI stub extends register 9 by the digest of the line in UTF-16 with its
// final zero (drivers/firmware/efi/libstub/efi-stub-helper.c). Nothing of the line stands in
// the log, so the digest is computed from each line that is allowed. An event counts as the
// line's if the reference values have an allowed line in its place.
func (j *judgement) commandLine(boot bootLog) {
	var allowed []digest.SHA256
	for _, line := range j.policy.CommandLines {
		allowed = append(allowed, digest.Of(tcglog.UTF16(line)))
	}
	is := func(sum digest.SHA256) bool { return slices.Contains(allowed, sum) }
	found := false
	for i, e := range boot.events[kernelRegister] {
		if !slices.ContainsFunc(boot.named[kernelRegister][i].SHA256, is) {
			continue
		}
		found = true
		if got := digest.SHA256(e.Digest(tcglog.SHA256)); !is(got) {
			j.differ("policy", "kernel command line", quotedList(j.policy.CommandLines), "another, of sha256 "+got.String(), commandLineNext)
		}
	}
	if !found {
		j.differ("policy", "kernel command line", quotedList(j.policy.CommandLines), "no event of register 9 for which the reference values have one of them", commandLineNext)
	}
}

const commandLineNext = "have the host boot with an allowed line, or add its line to command_lines in host_policy"

// dynamicLaunch wants a launch that the reference values name: register 17, which the launch
// itself extends, and each other of its registers for which they name anything. Without
// a launch none of them can have an event (see pcr.Composite).
func (j *judgement) dynamicLaunch(boot bootLog) {
	for _, i := range pcr.Dynamic {
		if i != pcr.Launch && len(j.reference().boot[i]) == 0 {
			continue
		}
		if list := boot.named[i]; !slices.ContainsFunc(list, func(e platform.Event) bool { return e.PCR == i }) {
			j.differ("policy", fmt.Sprintf("dynamic launch, PCR %d", i), "a launch that the reference values name", fmt.Sprintf("%d events, none of which they name", len(list)),
				"have the provider start the host by a dynamic launch, and sign reference values of a host that does")
		}
	}
}

func quotedList(list []string) string {
	quoted := make([]string, len(list))
	for i, s := range list {
		quoted[i] = fmt.Sprintf("%q", s)
	}
	return strings.Join(quoted, " or ")
}
