package orchestrator

import (
	"sync"
	"time"
)

// What one daemon may write into the journal, in bytes: a compromised one must not
// fill the tenant's disk. A hundred VMs that boot each second need a quarter of it.
const (
	journalBurst  = 32 << 20
	journalSecond = 256 << 10
)

// limiter keeps an allowance for each daemon.
type limiter struct {
	mu    sync.Mutex
	spent map[string]*spending // guarded by mu; by daemon, as many as there are certificates
}

// spending is what was written and is not forgotten yet.
type spending struct {
	bytes int64
	at    time.Time
}

// take reports whether the daemon may write so many bytes more, and counts them.
func (l *limiter) take(daemon string, bytes int, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.spent == nil {
		l.spent = map[string]*spending{}
	}
	s := l.spent[daemon]
	if s == nil {
		s = &spending{at: now}
		l.spent[daemon] = s
	}
	if past := now.Sub(s.at); past > 0 {
		s.bytes, s.at = max(0, s.bytes-int64(past.Seconds()*journalSecond)), now
	}
	if s.bytes+int64(bytes) > journalBurst {
		return false
	}
	s.bytes += int64(bytes)
	return true
}
