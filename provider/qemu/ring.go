package qemu

import "sync"

// ring keeps the last bytes written to it. Writing never fails and never blocks for
// long, so that a VM cannot be stopped, nor memory filled, by its own output.
type ring struct {
	mu   sync.Mutex
	buf  []byte // as long as the limit, once that many bytes came
	next int    // where the oldest byte lies, once buf is full
	size int    // limit in bytes
}

func newRing(size int) *ring { return &ring{size: size} }

func (r *ring) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := len(p)
	p = p[max(0, n-r.size):]
	if room := r.size - len(r.buf); room > 0 {
		k := min(room, len(p))
		r.buf = append(r.buf, p[:k]...)
		p = p[k:]
	}
	for len(p) > 0 {
		k := copy(r.buf[r.next:], p)
		p = p[k:]
		r.next = (r.next + k) % r.size
	}
	return n, nil
}

// Bytes is a copy of what is kept, oldest first.
func (r *ring) Bytes() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]byte, 0, len(r.buf))
	out = append(out, r.buf[r.next:]...)
	return append(out, r.buf[:r.next]...)
}
