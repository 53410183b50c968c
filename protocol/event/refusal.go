package event

import (
	"errors"
	"fmt"
	"strings"
)

// Refusal is an error with a stable reason: something was looked at and not allowed,
// or it failed in a way that people act on. Detail and Findings hold no secret; they
// reach the journal and the person who explains a VM.
type Refusal struct {
	Reason   Reason
	Detail   string
	Findings []FailedCheck // each check that failed, when several were made
}

// FailedCheck is one check that failed: what it is about, what was expected of it and seen
// instead, and what to do. Detail says the same in one sentence.
type FailedCheck struct {
	Check     string `json:"check"`
	Component string `json:"component"`
	Expected  string `json:"expected"`
	Seen      string `json:"seen"`
	Do        string `json:"do"`
	Detail    string `json:"detail"`
}

func (f FailedCheck) String() string { return f.Check + ": " + f.Detail }

func (r *Refusal) Error() string {
	text := string(r.Reason)
	if r.Detail != "" {
		text += ": " + r.Detail
	}
	if len(r.Findings) > 0 {
		text += ": " + Join(r.Findings)
	}
	return text
}

// Join is findings in one line.
func Join(findings []FailedCheck) string {
	list := make([]string, len(findings))
	for i, f := range findings {
		list[i] = f.String()
	}
	return strings.Join(list, "; ")
}

// Refuse makes a refusal of a formatted detail.
func Refuse(reason Reason, format string, args ...any) *Refusal {
	return &Refusal{Reason: reason, Detail: fmt.Sprintf(format, args...)}
}

// ReasonOf is the reason of the first refusal in err's chain, InternalError for any
// other error and "" for none.
func ReasonOf(err error) Reason {
	var refusal *Refusal
	switch {
	case err == nil:
		return ""
	case errors.As(err, &refusal):
		return refusal.Reason
	}
	return InternalError
}
