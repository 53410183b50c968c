package verify

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"time"

	"foothold/internal/strictjson"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/hostapi"
	"foothold/protocol/token"
	"foothold/protocol/vmspec"
)

// Limits in bytes of what a refusal without a judgement keeps of what came.
const (
	maxAnswer = 64 << 10 // of an answer that could not be read, its beginning
	maxSaid   = 512      // of somebody's words
)

// Cause is why a quote was refused before it could be judged. The set is closed.
type Cause string

// The causes.
const (
	CauseNonce    Cause = "nonce"    // it was used before, is not ours, or too old
	CauseAgain    Cause = "again"    // this start has its boot verdict
	CauseVMKey    Cause = "vm-key"   // another key than the one that came with T1
	CauseSession  Cause = "session"  // the boot server reports that it came to no quote
	CauseUnlisted Cause = "unlisted" // the host is not in the inventory
	CauseSilent   Cause = "silent"   // the host did not answer, or declined
	CauseAnswer   Cause = "answer"   // the host's answer cannot be read
	CauseLate     Cause = "late"     // no quote, or no good one, came in its time
)

// What a host was asked for.
const (
	AskedQuote    = "quote"    // hostapi.QuoteResponse
	AskedPlatform = "platform" // evidence.Platform
	AskedVM       = "vm"       // hostapi.VM
)

// Unjudged is a refusal before there was all that a quote is judged by: what was known, and
// what had come. No TPM has signed it.
type Unjudged struct {
	Role        string        `json:"role"` // of the quote that was awaited
	Reservation string        `json:"reservation"`
	Start       int           `json:"start"`
	Host        string        `json:"host"`
	Phase       string        `json:"phase"`    // the VM's
	Previous    digest.SHA256 `json:"previous"` // the start's newest accepted verdict; zero: none
	Cause       Cause         `json:"cause"`
	Reason      event.Reason  `json:"reason"` // with which it ended
	Said        string        `json:"said"`   // what the refusal said

	// What the quote would have been held against, as far as it applies.
	Settings *vmspec.Spec `json:"settings,omitempty"` // the reservation's own copy
	Nonce    []byte       `json:"nonce,omitempty"`
	VMKey    []byte       `json:"vm_key,omitempty"` // that came with T1
	Since    time.Time    `json:"since,omitzero"`   // late: when the nonce was given, or the last good quote
	Until    time.Time    `json:"until,omitzero"`   // late: the end of its time

	// What came.
	Tunnel  *TunnelEnd      `json:"tunnel,omitempty"`
	Quote   *evidence.Quote `json:"quote,omitempty"`
	Asked   string          `json:"asked,omitempty"`   // answer: for what
	Answer  []byte          `json:"answer,omitempty"`  // answer: its beginning
	Dropped int             `json:"dropped,omitempty"` // bytes of what came that are not kept: too many, or a token in them
}

// causes has of every cause its finding, and what of it no key shows.
var causes = map[Cause]struct {
	subject
	word string
}{
	CauseNonce: {subject{"the quote's nonce", "one of ours, for this quote of this start, fresh and not used before", "somebody replays quotes, or the boot server asks twice: treat it as suspect, and start the VM again"},
		"that the nonce served no more is the word of the orchestrator's ledger"},
	CauseAgain: {subject{"the start's boot verdict", "one", "treat the boot server as suspect: it asked for a second verdict; see its log"},
		"that a second verdict was asked for is the orchestrator's word"},
	CauseVMKey: {subject{"the VM's key", "the one that came with T1", "treat the boot server as suspect: it put another key in the VM's place; see its log"},
		"that the first key came with T1 is the word of the orchestrator's ledger; that the two differ is not"},
	CauseSession: {subject{"the boot server's session with the host's TPM", "a quote", "see the log of the boot server, then those of host and VM: foothold vm console"},
		"how the session went is the boot server's word"},
	CauseUnlisted: {subject{"the host", "one of the inventory", "import the inventory that lists it, or start the VM elsewhere"}, ""},
	CauseSilent: {subject{"the host's answer", "a quote, and what belongs to it", "see whether the host runs and can be reached: its agent's log"},
		"that the host gave no answer, or declined, is the orchestrator's word"},
	CauseAnswer: {subject{"the host's answer", "one that can be read", "use the host agent of the release that the tenant examined; treat the host as suspect until then"},
		"that the host gave these bytes is the orchestrator's word"},
	CauseLate: {subject{"", "", "see whether host and boot server run and can be reached, then start the VM again"},
		"that nothing came in time is the orchestrator's word"},
}

// Refuse seals a refusal that came before a quote could be judged. logs are the host's, as
// far as they had come. The verdict is never good: there is nothing that this could accept.
func (v *Verifier) Refuse(u Unjudged, logs evidence.Platform) Verdict {
	return v.refuse(u, logs, v.now().UTC().Round(0), 0)
}

func (v *Verifier) refuse(u Unjudged, logs evidence.Platform, at time.Time, dropped int) Verdict {
	u.bound()
	// Of several reference values none was tried: the newest are named.
	j := v.begin(u.Role, u.Reservation, u.Start, u.Host, at, v.references(u.Host, at)[0], logs, dropped)
	j.verdict.Previous = u.Previous
	about := causes[u.Cause]
	if u.Cause == CauseLate {
		about.component = fmt.Sprintf("the %s quote of host %s", u.Role, u.Host)
		about.expected = fmt.Sprintf("a good one within %v", u.Until.Sub(u.Since).Round(time.Millisecond))
	}
	f := Finding{Check: "unjudged", Component: about.component, Expected: about.expected, Seen: u.seen(), Do: about.do}
	f.Detail = f.Component + ": " + f.Seen
	j.add(f)
	return j.end(Record{Unjudged: &u})
}

// seen is what there was instead.
func (u *Unjudged) seen() string {
	switch u.Cause {
	case CauseLate:
		return "none since " + u.Since.UTC().Format(time.RFC3339)
	case CauseAgain:
		return "verdict " + u.Previous.String() + ", and another one was asked for"
	case CauseVMKey:
		if u.Tunnel != nil {
			return fmt.Sprintf("%x instead of %x", u.Tunnel.VMKey, u.VMKey)
		}
	}
	return u.Said
}

// bound leaves out what is too large, and what holds something like a token: whoever sends
// evidence chooses its bytes. Twice is as once.
func (u *Unjudged) bound() {
	drop := func(data *[]byte, most int) {
		if len(*data) > most || token.Within(*data) {
			u.Dropped += len(*data)
			*data = nil
		}
	}
	u.Since, u.Until = u.Since.UTC().Round(0), u.Until.UTC().Round(0)
	if over := len(u.Answer) - maxAnswer; over > 0 {
		u.Answer, u.Dropped = u.Answer[:maxAnswer:maxAnswer], u.Dropped+over
	}
	drop(&u.Answer, maxAnswer)
	if u.Tunnel != nil {
		t := *u.Tunnel
		drop(&t.ServerLeaf, maxLeaf)
		drop(&t.LoaderLeaf, maxLeaf)
		drop(&t.VMKey, maxSaid)
		u.Tunnel = &t
	}
	if u.Quote != nil {
		q := *u.Quote
		drop(&q.Attest, maxQuote)
		drop(&q.Signature, maxQuote)
		u.Quote = &q
	}
	said := []byte(u.Said)
	if len(said) > maxSaid {
		said = bytes.ToValidUTF8(said[:maxSaid], nil)
	}
	if token.Within(said) {
		said = []byte("(left out: it held something like a token)")
	}
	u.Said = string(said)
}

// facts holds a cause against what the record has of it: an error says that it cannot be.
func (u *Unjudged) facts(v *Verifier, at time.Time) error {
	if _, known := phaseOf(u.Role); !known {
		return fmt.Errorf("%q is no role of a VM's quote", u.Role)
	}
	boot := u.Role == evidence.RoleBoot
	switch u.Cause {
	case CauseNonce:
		return unless(len(u.Nonce) == evidence.NonceLen && u.Quote != nil, "a nonce was refused, and it or the quote is not here")
	case CauseAgain:
		return unless(boot && !u.Previous.IsZero(), "a second verdict was refused, and there is no first")
	case CauseVMKey:
		return unless(boot && u.Tunnel != nil && !bytes.Equal(u.Tunnel.VMKey, u.VMKey), "another key was refused, and the two are the same")
	case CauseSession:
		return unless(boot && u.Previous.IsZero() && u.Quote == nil, "a boot that came to no quote has a quote or a verdict")
	case CauseUnlisted:
		_, listed := v.inventory.hosts[u.Host]
		return unless(!listed, "the host was refused for not being in the inventory, and is in it")
	case CauseSilent:
		return unless(u.Answer == nil && (boot || u.Quote == nil), "the host gave no answer, and an answer is here")
	case CauseAnswer:
		return u.unreadable()
	case CauseLate:
		return unless(!u.Since.IsZero() && u.Since.Before(u.Until) && !u.Until.After(at), "it was late at %s, and its time ended at %s", at.Format(time.RFC3339), u.Until.Format(time.RFC3339))
	}
	return fmt.Errorf("%q is no cause of a refusal", u.Cause)
}

// unreadable reads an answer that could not be read again.
func (u *Unjudged) unreadable() error {
	var into any
	switch u.Asked {
	case AskedQuote:
		into = &hostapi.QuoteResponse{}
	case AskedPlatform:
		into = &evidence.Platform{}
	case AskedVM:
		into = &hostapi.VM{}
	default:
		return fmt.Errorf("%q is nothing that a host is asked for", u.Asked)
	}
	if u.Dropped > 0 { // the rest is not here to try
		return nil
	}
	return unless(strictjson.Unmarshal(u.Answer, into) != nil, "the answer was refused for being unreadable, and can be read")
}

// words are what of a refusal no key shows: somebody's word.
func (u *Unjudged) words() []string {
	var list []string
	if w := causes[u.Cause].word; w != "" {
		list = append(list, w)
	}
	if u.Dropped > 0 {
		list = append(list, fmt.Sprintf("%d bytes of what came are not kept, and nothing shows what they were", u.Dropped))
	}
	return append(list, "no quote was made over it: that it was decided then, and so, the journal's entry evidence.kept with this digest says")
}

// hangs holds the refusals without a judgement of one start against its chain. At most one
// ends a start. It follows the verdict that was the newest when it was decided: one that was
// being reached meanwhile may follow the same.
func hangs(refusals []Link, order []Link, complete bool) error {
	if len(refusals) > 1 {
		return fmt.Errorf("%d refusals without a judgement: one ends a start", len(refusals))
	}
	for _, r := range refusals {
		phase, known := phaseOf(r.Role)
		switch at := slices.IndexFunc(order, func(l Link) bool { return l.Digest() == r.Previous }); {
		case r.Accepted:
			return errors.New("it accepts what was not judged")
		case !known:
			return fmt.Errorf("it is of role %q", r.Role)
		case r.Previous.IsZero() && phase != "booting":
			return fmt.Errorf("it is of role %s, and follows no verdict", r.Role)
		case at < 0 && !r.Previous.IsZero() && (complete || len(order) > 0):
			return fmt.Errorf("it follows verdict %s, which is not here", r.Previous.Short())
		case at >= 0 && !order[at].Accepted:
			return errors.New("it follows a refusal, which ended the start")
		case at >= 0 && r.At.Add(clockSkew).Before(order[at].At):
			return errors.New("it was decided before the verdict that it follows")
		case len(order) > 0 && r.Host != order[0].Host:
			return fmt.Errorf("it is of host %s, the verdicts are of %s", r.Host, order[0].Host)
		}
	}
	return nil
}
