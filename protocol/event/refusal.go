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
	Findings []string // each check that failed, when several were made
}

func (r *Refusal) Error() string {
	text := string(r.Reason)
	if r.Detail != "" {
		text += ": " + r.Detail
	}
	if len(r.Findings) > 0 {
		text += ": " + strings.Join(r.Findings, "; ")
	}
	return text
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
