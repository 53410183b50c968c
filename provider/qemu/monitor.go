package qemu

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

const (
	maxLine        = 256 << 10        // of QEMU's monitor, in bytes
	monitorTimeout = 10 * time.Second // of one command; TCG on a busy machine is slow to begin
	maxCrashLoads  = 8                // times that a guest may say that it goes on in a crash kernel, which none of ours has
)

var errMonitor = errors.New("QEMU's monitor has ended")

// monitor speaks QMP, QEMU's JSON protocol, one command at a time. Of its events only
// the reason of a shutdown is kept. What it cannot make sense of ends the connection,
// and with it the VM.
type monitor struct {
	conn    net.Conn
	replies chan reply // closed when the connection has ended
	mu      sync.Mutex // one command at a time

	ended chan struct{} // closed when the connection has ended

	state    sync.Mutex // guards shutdown
	shutdown string
}

type reply struct {
	Greeting json.RawMessage `json:"QMP"`
	Return   json.RawMessage `json:"return"`
	Error    *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	Event string `json:"event"`
	Data  struct {
		Reason string `json:"reason"`
	} `json:"data"`
}

// newMonitor waits for the greeting and leaves negotiation mode.
func newMonitor(conn net.Conn) (*monitor, error) {
	m := &monitor{conn: conn, replies: make(chan reply, 1), ended: make(chan struct{})}
	go m.read()
	select {
	case r, ok := <-m.replies:
		if !ok || r.Greeting == nil {
			return nil, errMonitor
		}
	case <-time.After(monitorTimeout):
		return nil, errors.New("QEMU's monitor does not greet")
	}
	if _, err := m.command("qmp_capabilities"); err != nil {
		return nil, err
	}
	return m, nil
}

// read takes lines until the connection ends.
func (m *monitor) read() {
	defer m.conn.Close()
	defer close(m.ended)
	defer close(m.replies)
	lines := bufio.NewScanner(m.conn)
	lines.Buffer(nil, maxLine)
	crashLoads := 0
	for lines.Scan() {
		var r reply
		if json.Unmarshal(lines.Bytes(), &r) != nil {
			return
		}
		switch r.Event {
		case "":
			select {
			case m.replies <- r:
			default: // a reply that nobody waits for
				m.conn.Close()
				return
			}
		case "SHUTDOWN":
			m.state.Lock()
			m.shutdown = r.Data.Reason
			m.state.Unlock()
		case "GUEST_CRASHLOADED": // the one event of a device that a guest can cause without end
			if crashLoads++; crashLoads > maxCrashLoads {
				return
			}
		}
	}
}

// command carries out a command without arguments.
func (m *monitor) command(name string) (json.RawMessage, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.conn.SetWriteDeadline(time.Now().Add(monitorTimeout)); err != nil {
		return nil, fmt.Errorf("ask QEMU %s: %w", name, err)
	}
	if _, err := fmt.Fprintf(m.conn, `{"execute":%q}`+"\n", name); err != nil {
		return nil, fmt.Errorf("ask QEMU %s: %w", name, err)
	}
	select {
	case r, ok := <-m.replies:
		if !ok {
			return nil, fmt.Errorf("ask QEMU %s: %w", name, errMonitor)
		}
		if r.Error != nil {
			return nil, fmt.Errorf("ask QEMU %s: %s: %s", name, r.Error.Class, r.Error.Desc)
		}
		return r.Return, nil
	case <-time.After(monitorTimeout):
		m.conn.Close() // a late reply must not be taken for another command's
		return nil, fmt.Errorf("ask QEMU %s: no answer", name)
	}
}

// status is QEMU's run state, such as "running".
func (m *monitor) status() (string, error) {
	data, err := m.command("query-status")
	if err != nil {
		return "", err
	}
	var s struct {
		Status string `json:"status"`
	}
	if err := json.Unmarshal(data, &s); err != nil {
		return "", fmt.Errorf("ask QEMU query-status: %w", err)
	}
	return s.Status, nil
}

// reason is why the guest was shut down, such as "guest-shutdown", or "". It waits for
// the connection's end, which comes with QEMU's.
func (m *monitor) reason() string {
	<-m.ended
	m.state.Lock()
	defer m.state.Unlock()
	return m.shutdown
}
