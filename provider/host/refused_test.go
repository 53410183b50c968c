package host

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"foothold/internal/mtls"
	"foothold/protocol/hostapi"
)

// journal is a log that is written to and read at once.
type journal struct {
	mu   sync.Mutex
	data bytes.Buffer // guarded by mu
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.data.Write(p)
}

// lines are those that contain the text.
func (j *journal) lines(text string) (list []string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, l := range strings.Split(j.data.String(), "\n") {
		if strings.Contains(l, text) {
			list = append(list, l)
		}
	}
	return list
}

// TestRefusedCallersAreLogged: the provider finds in the agent's log whom it refused, with
// call and reason, and who did not come as far as a call.
func TestRefusedCallersAreLogged(t *testing.T) {
	log, before := &journal{}, slog.Default()
	slog.SetDefault(slog.New(slog.NewJSONHandler(log, nil)))
	t.Cleanup(func() { slog.SetDefault(before) })
	w := newWorld(t, nil)
	w.run()
	w.client("acme-orchestrator").ok("GET", "/v1/vms", nil, &[]hostapi.VM{})
	w.client("nobody").refused("GET", "/v1/vms", nil, "not-permitted")
	w.client("acme-orchestrator").refused("POST", "/v1/vms", map[string]string{"more": "x"}, "bad-request")
	want := []struct{ call, caller, reason string }{
		{"GET /v1/vms", "orchestrator/nobody", "not-permitted"}, {"POST /v1/vms", "orchestrator/acme-orchestrator", "bad-request"}}
	lines := log.lines("call refused")
	if len(lines) != len(want) {
		t.Fatalf("logged:\n%s", strings.Join(lines, "\n"))
	}
	for i, line := range lines {
		var got struct{ Call, Caller, Reason, Error string }
		if err := json.Unmarshal([]byte(line), &got); err != nil {
			t.Fatal(err)
		}
		if got.Call != want[i].call || got.Caller != want[i].caller || got.Reason != want[i].reason || got.Error == "" {
			t.Errorf("logged as %+v, want %+v", got, want[i])
		}
	}
	const failed = "TLS handshake error from 127.0.0.1"
	for _, c := range []*client{w.clientOf(w.tenants, mtls.Identity{Role: mtls.Gateway, Name: "acme"}),
		w.clientOf(newAuthority(t), mtls.Identity{Role: mtls.Orchestrator, Name: "acme-orchestrator"})} {
		if status, data := c.call("GET", "/v1/vms", nil); status != 0 {
			t.Errorf("answered: %d %s", status, data)
		}
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		told := append(log.lines("gateway/acme may not call here"), log.lines("unknown authority")...)
		if len(told) == 2 && strings.Contains(told[0], failed) && strings.Contains(told[1], failed) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("handshakes are logged as:\n%s", strings.Join(log.lines(failed), "\n"))
		}
	}
}
