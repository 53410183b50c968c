package verify

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"foothold/internal/strictjson"
	"foothold/protocol/digest"
	"foothold/protocol/imalog"
	"foothold/protocol/tcglog"
)

// maxEvidence bounds stored evidence in bytes: a host's logs in base64, or a launcher's, and
// what goes with them.
const maxEvidence = 4<<20 + (tcglog.MaxSize+imalog.MaxSize)*4/3

// stored is a verdict's evidence as the ledger keeps it. It is no permission: what is
// read back is verified again.
type stored struct {
	At     time.Time     `json:"at"`
	Boot   *bootRecord   `json:"boot,omitempty"`
	Static *staticRecord `json:"static,omitempty"`
}

type bootRecord struct {
	Expect   BootExpectation `json:"expect"`
	Evidence BootEvidence    `json:"evidence"`
}

type staticRecord struct {
	Expect   StaticExpectation `json:"expect"`
	Evidence StaticEvidence    `json:"evidence"`
}

func (s stored) encode(into *[]byte) error {
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if len(data) > maxEvidence {
		return strictjson.ErrTooLarge
	}
	*into = data
	return nil
}

// Reverify judges stored evidence again, as of when it was first judged, by the
// inventory and the reference values that count now. That is how a permission survives
// a restart of the process; it still ends when it would have ended. want is the digest
// under which the ledger keeps the verdict: evidence that leads to another is refused.
func (v *Verifier) Reverify(want digest.SHA256, data []byte) (*Admitted, Verdict, error) {
	a, verdict, err := v.again(data)
	if err != nil {
		return nil, verdict, err
	}
	if want.IsZero() || verdict.Digest != want {
		return nil, verdict, errors.New("stored evidence leads to another verdict than the ledger's")
	}
	return a, verdict, verdict.Err()
}

// again judges stored evidence as of when it was first judged.
func (v *Verifier) again(data []byte) (a *Admitted, verdict Verdict, err error) {
	var s stored
	if len(data) > maxEvidence {
		return nil, verdict, fmt.Errorf("stored evidence: %w", strictjson.ErrTooLarge)
	}
	if err := strictjson.Unmarshal(data, &s); err != nil {
		return nil, verdict, fmt.Errorf("stored evidence: %w", err)
	}
	if now := v.now(); s.At.After(now.Add(clockSkew)) { // this machine's clock was set back
		return nil, verdict, ahead("stored evidence: it was judged", s.At, now)
	}
	switch {
	case s.Boot != nil && s.Static == nil:
		a, verdict = v.boot(s.Boot.Expect, s.Boot.Evidence, s.At)
	case s.Static != nil && s.Boot == nil:
		a, verdict = v.static(s.Static.Expect, s.Static.Evidence, s.At)
	default:
		return nil, verdict, errors.New("stored evidence is of no known kind")
	}
	return a, verdict, nil
}
