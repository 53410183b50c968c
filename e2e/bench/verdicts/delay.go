package verdicts

import (
	"errors"
	"net"
	"sync"
	"time"
)

// delay is a connection over which what is written leaves so much later, in order; the
// writer does not wait. Together with the way back, which is not delayed, that is one
// round trip.
type delay struct {
	net.Conn
	by    time.Duration
	queue chan parcel

	closing sync.Once
	closed  chan struct{}

	mu  sync.Mutex
	err error // guarded by mu: of a write that came to nothing
}

type parcel struct {
	due  time.Time
	data []byte
}

// queued bounds the writes under way; a call is one or two.
const queued = 64

var errClosed = errors.New("the delayed connection is closed")

func delayed(conn net.Conn, by time.Duration) net.Conn {
	if by <= 0 {
		return conn
	}
	d := &delay{Conn: conn, by: by, queue: make(chan parcel, queued), closed: make(chan struct{})}
	go d.deliver()
	return d
}

func (d *delay) deliver() {
	for {
		select {
		case <-d.closed:
			return
		case p := <-d.queue:
			time.Sleep(time.Until(p.due))
			if _, err := d.Conn.Write(p.data); err != nil {
				d.mu.Lock()
				d.err = err
				d.mu.Unlock()
				return
			}
		}
	}
}

// Write takes a copy.
func (d *delay) Write(data []byte) (int, error) {
	d.mu.Lock()
	err := d.err
	d.mu.Unlock()
	if err != nil {
		return 0, err
	}
	select {
	case d.queue <- parcel{time.Now().Add(d.by), append([]byte(nil), data...)}:
		return len(data), nil
	case <-d.closed:
		return 0, errClosed
	}
}

// Close drops what is under way.
func (d *delay) Close() error {
	d.closing.Do(func() { close(d.closed) })
	return d.Conn.Close()
}
