package verify

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/platform"
)

// Pinned is what somebody believes who audits decisions without the orchestrator: none of it
// is ever taken from a bundle.
type Pinned struct {
	InventoryKey ed25519.PublicKey // the provider's
	PlatformKey  ed25519.PublicKey // of reference values
	Makers       *Manufacturers
	Profile      string
	Now          func() time.Time
}

// Test is one thing that was held against another.
type Test struct {
	Name  string `json:"name"`
	Holds bool   `json:"holds"`
	Says  string `json:"says"`
}

// Audited is what a bundle proves by the pinned keys alone. Verdict and findings are derived
// anew from its evidence, as of when it was judged. It is no permission and leads to none.
type Audited struct {
	Link
	Digest    digest.SHA256 `json:"digest"`
	Inventory int           `json:"inventory_version"`
	Platform  string        `json:"platform"`
	Policy    *Policy       `json:"policy,omitempty"` // as recorded: the tenant's own, that no key signs
	Derived   bool          `json:"derived_accepted"` // by these keys the evidence proves what it must
	Findings  []Finding     `json:"findings"`         // derived; where there are any, all of them
	Tests     []Test        `json:"tests"`
	Cause     Cause         `json:"cause,omitempty"` // of a refusal before there was a quote to judge
	// Unproved says of such a refusal what rests on somebody's word, and on no key.
	Unproved []string `json:"unproved,omitempty"`
	clock    Clock    // derived; zero for a refused quote
	last     Clock    // that the quote was held against
	nonce    []byte
}

// Holds reports whether the bundle is what it says that it is: an acceptance or a refusal,
// rightly.
func (a Audited) Holds() bool { return holds(a.Tests) }

func holds(tests []Test) bool {
	return len(tests) > 0 && !slices.ContainsFunc(tests, func(t Test) bool { return !t.Holds })
}

func (p Pinned) validate() error {
	if len(p.InventoryKey) != ed25519.PublicKeySize || len(p.PlatformKey) != ed25519.PublicKeySize || p.Makers == nil || p.Now == nil || !validProfile(p.Profile) {
		return errors.New("audit: needs both public keys, TPM manufacturers, a profile and a clock")
	}
	return nil
}

// Audit derives a bundle's verdict again. An error means that it could not be tried.
func (p Pinned) Audit(b *Bundle) (Audited, error) {
	if err := p.validate(); err != nil {
		return Audited{}, err
	}
	link, err := b.link()
	if err != nil {
		return Audited{}, err
	}
	r := b.Record
	a := Audited{Link: link, Digest: b.Digest, Inventory: r.Inventory.Version, Policy: r.Policy, Findings: []Finding{}}
	test := func(name string, err error, says string) bool {
		if err != nil {
			says = err.Error()
		}
		a.Tests = append(a.Tests, Test{name, err == nil, says})
		return err == nil
	}
	test("digest", same(b.Digest, link.Digest()), "the record has the digest "+b.Digest.String())
	test("profile", unless(r.Profile == p.Profile, "it was judged for profile %q, want %q", r.Profile, p.Profile), r.Profile)
	test("time", p.times(r), "judged at "+r.At.Format(time.RFC3339Nano))
	v, err := p.ground(b)
	if !test("ground", err, fmt.Sprintf("inventory version %d and the reference values, if there are any, are signed by the pinned keys and are those of the record", r.Inventory.Version)) {
		return a, nil // nothing to derive it from
	}
	for name := range v.platforms {
		a.Platform = name
	}
	derived := v.derive(r, b.Logs)
	a.Derived, a.Findings, a.clock = derived.Good(), append(a.Findings, derived.Findings...), derived.Clock
	says := "the evidence leads to an acceptance, as recorded"
	if !a.Derived {
		says = fmt.Sprintf("the evidence leads to a refusal with %d findings, as recorded", len(a.Findings))
	}
	// The digest covers the record, with all that was found: this is the whole comparison.
	test("verdict", asRecorded(b, derived), says)
	switch {
	case r.Boot != nil:
		a.nonce, a.last = r.Boot.Expect.Nonce, r.Boot.Expect.Clock
	case r.Static != nil:
		a.nonce, a.last = r.Static.Expect.Nonce, r.Static.Expect.Clock
	default:
		a.nonce, a.Cause, a.Unproved = r.Unjudged.Nonce, r.Unjudged.Cause, r.Unjudged.words()
		test("cause", r.Unjudged.facts(v, r.At), fmt.Sprintf("refused before there was a quote to judge (%s), in keeping with what had come", a.Cause))
	}
	return a, nil
}

// derive judges again what a record says was judged.
func (v *Verifier) derive(r Record, logs evidence.Platform) Verdict {
	if u := r.Unjudged; u != nil {
		return v.refuse(*u, logs, r.At, r.Dropped)
	}
	if b := r.Boot; b != nil {
		return v.boot(b.Expect, BootEvidence{b.Tunnel.ExporterHash, b.Tunnel.ServerLeaf, b.Tunnel.LoaderLeaf, b.Tunnel.VMKey, b.Quote, logs}, r.At, r.Dropped)
	}
	return v.static(r.Static.Expect, StaticEvidence{r.Static.Quote, logs}, r.At, r.Dropped)
}

// ground opens inventory and reference values by the pinned keys, as of when they were read.
func (p Pinned) ground(b *Bundle) (*Verifier, error) {
	r := b.Record
	data, err := json.Marshal(b.Inventory)
	if err != nil {
		return nil, err
	}
	inv, err := StoredInventory(data, p.InventoryKey, p.Makers, r.Inventory.Read)
	if err != nil {
		return nil, fmt.Errorf("inventory: %w", err)
	}
	if inv.digest != r.Inventory.SHA256 || inv.doc.Version != r.Inventory.Version {
		return nil, errors.New("inventory: it is another than the record names")
	}
	v := &Verifier{inventory: inv, platforms: map[string][]*Platform{}, profile: p.Profile, now: p.Now}
	if r.Policy != nil {
		if err := r.Policy.check(platform.Production); err != nil { // a lab's is complete as well
			return nil, fmt.Errorf("policy: %w", err)
		}
		v.policies = Policies{Default: *r.Policy}
	}
	if (b.Platform == nil) != (r.Platform == nil) {
		return nil, errors.New("reference values: record and bundle do not agree whether there are any")
	}
	if b.Platform == nil {
		return v, nil
	}
	if data, err = json.Marshal(b.Platform); err != nil {
		return nil, err
	}
	reference, err := StoredPlatform(data, p.PlatformKey, p.Profile, r.Platform.Read)
	if err != nil {
		return nil, fmt.Errorf("reference values: %w", err)
	}
	if reference.digest != r.Platform.SHA256 || reference.doc.Name != r.Platform.Name {
		return nil, errors.New("reference values: they are others than the record names")
	}
	v.platforms[reference.doc.Name] = []*Platform{reference}
	return v, nil
}

// times refuses a record of the future, and one whose ground was read after it was judged by
// more than a clock that was set back explains.
func (p Pinned) times(r Record) error {
	latest := r.Inventory.Read
	if r.Platform != nil && r.Platform.Read.After(latest) {
		latest = r.Platform.Read
	}
	if now := p.Now(); r.At.After(now.Add(clockSkew)) {
		return ahead("it was judged", r.At, now)
	}
	return unless(!latest.After(r.At.Add(clockSkew)), "it was judged before its inventory or reference values were read")
}

func same(a, b digest.SHA256) error {
	return unless(a == b && !a.IsZero(), "it says that its digest is %s, its record has %s", a, b)
}

func unless(ok bool, format string, args ...any) error {
	if ok {
		return nil
	}
	return fmt.Errorf(format, args...)
}

// asRecorded compares the derived verdict with the recorded one.
func asRecorded(b *Bundle, derived Verdict) error {
	if derived.Digest == b.Digest && !b.Digest.IsZero() {
		return nil
	}
	says := map[bool]string{true: "an acceptance", false: "a refusal"}
	text := fmt.Sprintf("the evidence leads to %s, recorded is %s", says[derived.Good()], says[b.Record.Accepted])
	if derived.Good() == b.Record.Accepted {
		text = "the evidence leads to another record than this one"
		was, is := texts(b.Record.Findings), texts(derived.Findings)
		for i := range max(len(was), len(is)) {
			if i >= len(was) || i >= len(is) || was[i] != is[i] {
				text += fmt.Sprintf("; finding %d differs", i+1)
				break
			}
		}
	}
	return errors.New(text)
}

func texts(findings []Finding) []string {
	list := make([]string, len(findings))
	for i, f := range findings {
		data, _ := json.Marshal(f) // strings alone
		list[i] = string(data)
	}
	return list
}

// AuditedChain is what the bundles and links of one start prove together.
type AuditedChain struct {
	Reservation string        `json:"reservation"`
	Start       int           `json:"start"`
	Verdicts    int           `json:"verdicts"`         // in the chain
	Bundles     int           `json:"bundles"`          // of them, whose evidence is here
	Last        digest.SHA256 `json:"last"`             // the newest verdict
	Complete    bool          `json:"complete"`         // from the boot verdict on
	Missing     digest.SHA256 `json:"missing,omitzero"` // not complete: the verdict before the first one here
	Tests       []Test        `json:"tests"`
}

// Holds reports whether what is here is one chain.
func (c AuditedChain) Holds() bool { return holds(c.Tests) }

// AuditChain holds the verdicts of one start against each other: bundles that were audited,
// and links for those that are not kept any more.
func AuditChain(bundles []Audited, links []Link) AuditedChain {
	nodes, unjudged := map[digest.SHA256]Link{}, map[digest.SHA256]Link{}
	audited := map[digest.SHA256]Audited{}
	var c AuditedChain
	test := func(name string, err error, says string) {
		if err != nil {
			says = err.Error()
		}
		c.Tests = append(c.Tests, Test{name, err == nil, says})
	}
	add := func(l Link) {
		c.Reservation, c.Start = l.Reservation, l.Start
		if l.Unjudged {
			unjudged[l.Digest()] = l
			return
		}
		nodes[l.Digest()] = l
	}
	for _, l := range links {
		add(l)
	}
	for _, a := range bundles {
		add(a.Link)
		audited[a.Link.Digest()] = a
	}
	c.Verdicts, c.Bundles = len(nodes)+len(unjudged), len(audited)
	refusals := slices.Collect(maps.Values(unjudged))
	if len(nodes) == 0 && len(refusals) > 0 {
		c.alone(refusals)
		return c
	}
	order, err := c.line(nodes)
	if err == nil && slices.ContainsFunc(refusals, func(l Link) bool { return l.Reservation != c.Reservation || l.Start != c.Start }) {
		err = errSeveral
	}
	test("chain", err, fmt.Sprintf("%d verdicts, each made over the one before", len(nodes)))
	if err != nil {
		return c
	}
	c.Last = order[len(order)-1].Digest()
	if first := order[0]; first.Previous.IsZero() {
		c.Complete = true
	} else {
		c.Missing = first.Previous
	}
	test("order", phasesInOrder(order, c.Complete), "boot, unlock, connect, then watch; nothing follows a refusal")
	test("continuity", continues(order, audited), "one host, times and TPM counters that go on, each nonce once")
	if len(refusals) > 0 {
		test("refusal", hangs(refusals, order, c.Complete), "the start ended with a refusal before there was a quote to judge"+repeated(refusals[0], order, audited))
		if !refusals[0].At.Before(order[len(order)-1].At) {
			c.Last = refusals[0].Digest()
		}
	}
	return c
}

// alone is a chain of no verdict, but of the refusal that came before any.
func (c *AuditedChain) alone(refusals []Link) {
	err := hangs(refusals, nil, false)
	says := "the start ended with a refusal before any quote was judged"
	if err != nil {
		says = err.Error()
	}
	c.Tests = append(c.Tests, Test{"refusal", err == nil, says})
	c.Last, c.Missing = refusals[0].Digest(), refusals[0].Previous
	c.Complete = c.Missing.IsZero()
}

// repeated says where the nonce of a refusal had served before, if that is here.
func repeated(refusal Link, order []Link, audited map[digest.SHA256]Audited) string {
	a := audited[refusal.Digest()]
	if a.Cause != CauseNonce {
		return ""
	}
	for i, l := range order {
		if other, here := audited[l.Digest()]; here && bytes.Equal(other.nonce, a.nonce) {
			return fmt.Sprintf("; its nonce is that of verdict %d, so it had been used", i+1)
		}
	}
	return ""
}

var errSeveral = errors.New("they are of several starts")

// line puts verdicts in order. Two that follow the same one, or a gap, are no chain.
func (c AuditedChain) line(nodes map[digest.SHA256]Link) ([]Link, error) {
	next := map[digest.SHA256]digest.SHA256{}
	var first []digest.SHA256
	for sum, n := range nodes {
		if n.Reservation != c.Reservation || n.Start != c.Start {
			return nil, errSeveral
		}
		if _, here := nodes[n.Previous]; !here {
			first = append(first, sum)
			continue
		}
		if other, taken := next[n.Previous]; taken {
			return nil, fmt.Errorf("two verdicts follow %s: %s and %s", n.Previous.Short(), other.Short(), sum.Short())
		}
		next[n.Previous] = sum
	}
	if len(first) != 1 {
		list := make([]string, len(first))
		for i, sum := range first {
			list[i] = sum.Short()
		}
		slices.Sort(list)
		return nil, fmt.Errorf("they are no one chain: %d verdicts follow none that is here (%s)", len(first), strings.Join(list, ", "))
	}
	order := make([]Link, 0, len(nodes))
	for at, ok := first[0], true; ok; at, ok = next[at] {
		order = append(order, nodes[at])
	}
	return order, unless(len(order) == len(nodes), "they are no one chain")
}

// phasesInOrder holds roles against the order of phases.
func phasesInOrder(order []Link, complete bool) error {
	rank := map[string]int{evidence.RoleBoot: 0, evidence.RoleUnlock: 1, evidence.RoleConnect: 2, evidence.RoleWatch: 3}
	for i, n := range order {
		r, known := rank[n.Role]
		switch {
		case !known || n.Previous.IsZero() != (r == 0):
			return fmt.Errorf("verdict %d is of role %q, which has no place there", i+1, n.Role)
		case !n.Accepted && i < len(order)-1:
			return fmt.Errorf("verdict %d is a refusal, and another one follows it", i+1)
		}
		if i == 0 {
			if complete && r != 0 {
				return errors.New("the first verdict is not a boot's")
			}
			continue
		}
		before := rank[order[i-1].Role]
		if r != before && r != before+1 || r == 0 { // an orchestrator that begins anew asks again
			return fmt.Errorf("verdict %d: %s follows %s", i+1, n.Role, order[i-1].Role)
		}
	}
	return nil
}

// continues compares what neighbours have in common.
func continues(order []Link, audited map[digest.SHA256]Audited) error {
	nonces := map[string]bool{}
	for i, n := range order {
		a, here := audited[n.Digest()]
		if here {
			if nonces[string(a.nonce)] {
				return fmt.Errorf("verdict %d has the nonce of an earlier one", i+1)
			}
			nonces[string(a.nonce)] = true
		}
		if i == 0 {
			continue
		}
		before := order[i-1]
		switch last, ok := audited[before.Digest()]; {
		case n.Host != before.Host:
			return fmt.Errorf("verdict %d is of host %s, the one before of %s", i+1, n.Host, before.Host)
		case n.At.Add(clockSkew).Before(before.At):
			return fmt.Errorf("verdict %d was judged before the one that it follows", i+1)
		case here && ok && a.last != last.clock:
			return fmt.Errorf("verdict %d was held against other counters than the TPM had at the one before", i+1)
		}
	}
	return nil
}
