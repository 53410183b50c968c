package verify

import (
	"sync"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/transcript"
	"foothold/protocol/vmspec"
)

// maxLeaves bounds how many boot servers' certificates are remembered; an installation
// has a handful.
const maxLeaves = 64

// leaves remembers the boot servers' certificates that were found believable, each with
// the authority and name that it was held to, and for how long that holds: of what
// believable checks nothing depends on the time but the certificates' validity. The same
// few come with every quote, and their signature costs as much as the quote's.
type leaves struct {
	mu    sync.Mutex
	known map[digest.SHA256]validity // guarded by mu
}

// validity begins and ends with these.
type validity struct{ from, until time.Time }

func (v validity) at(t time.Time) bool { return !t.Before(v.from) && !t.After(v.until) }

// believable is the function of that name, with a memory, or without one where l is nil.
func (l *leaves) believable(leaf []byte, boot vmspec.Boot, at time.Time) error {
	if l == nil {
		_, err := believable(leaf, boot, at)
		return err
	}
	key := transcript.Sum("foothold/believable-leaf/v1", leaf, boot.CA, []byte(boot.ServerName))
	l.mu.Lock()
	v, ok := l.known[key]
	l.mu.Unlock()
	if ok && v.at(at) {
		return nil
	}
	v, err := believable(leaf, boot, at)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.known == nil || len(l.known) >= maxLeaves {
		l.known = map[digest.SHA256]validity{}
	}
	l.known[key] = v
	return nil
}
