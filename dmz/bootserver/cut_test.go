package bootserver

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"foothold/dmz/upstream/upstreamtest"
	"foothold/internal/mtls"
	"foothold/protocol/bootmsg"
	"foothold/protocol/event"
	"foothold/protocol/token"
	wire "foothold/protocol/upstream"
)

// TestMain runs the daemon itself when a test starts it as a process.
func TestMain(m *testing.M) { os.Exit(upstreamtest.Main(Run, m.Run)) }

// process configures a second boot server of a world, a process that can be killed. From
// here on VMs go there.
func (w *world) process() *upstreamtest.Daemon {
	w.t.Helper()
	c := w.conf
	c.State, c.Listen = filepath.Join(w.state, "process"), free(w.t)
	c.Upstream = w.orch.Config(mtls.BootServer, "boot-1")
	w.addr = c.Listen.String()
	return upstreamtest.NewDaemon(w.t, nil, c)
}

// launch starts it and waits until it listens.
func (w *world) launch(d *upstreamtest.Daemon) {
	w.t.Helper()
	d.Start()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		c, err := net.Dial("tcp", w.addr)
		if err == nil {
			c.Close()
			return
		}
		if time.Now().After(end) {
			w.t.Fatal("the boot server does not listen")
		}
	}
}

// spendOnce has the orchestrator take the world's T1 once, as the ledger does.
func (w *world) spendOnce() (refused *atomic.Int32) {
	spent := map[token.Token]bool{}
	refused = &atomic.Int32{}
	w.orch.Open = func(r wire.OpenRequest) (wire.OpenResponse, error) {
		w.mu.Lock()
		defer w.mu.Unlock()
		if spent[r.Token] {
			refused.Add(1)
			return wire.OpenResponse{}, event.Refuse(event.TokenSpent, "a second time")
		}
		spent[r.Token] = true
		return w.open(r)
	}
	return refused
}

// soon is a connection as soon as the process's gate lets this address in.
func (w *world) soon() *vm {
	w.t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		v, err := w.dial()
		if err == nil {
			return v
		}
		if time.Now().After(end) {
			w.t.Fatalf("the boot server lets nobody in: %v", err)
		}
	}
}

// partOf begins to fetch the initramfs and stops reading in the middle.
func (v *vm) partOf(n int64) io.ReadCloser {
	v.w.t.Helper()
	req, err := http.NewRequest("GET", "https://"+bootDNS+bootmsg.PathInitramfs, nil)
	v.w.must(err)
	v.w.must(req.Write(v.conn))
	res, err := http.ReadResponse(v.in, req)
	v.w.must(err)
	if _, err := io.CopyN(io.Discard, res.Body, n); err != nil || res.StatusCode != http.StatusOK {
		v.w.t.Fatalf("fetch: status %d, %v", res.StatusCode, err)
	}
	return res.Body
}

// The boot server is killed while a VM fetches. The VM sees an end before the component's;
// the boot server that follows knows nothing of the VM, so its spent T1 opens nothing there
// and nothing is delivered without; and the next VM meets a boot server that works.
func TestKilledInMidDelivery(t *testing.T) {
	w := newWorld(t)
	refused := w.spendOnce()
	daemon := w.process()
	w.launch(daemon)
	v := w.soon()
	w.must(v.conn.NetConn().(*net.TCPConn).SetReadBuffer(64 << 10)) // so that no buffer holds what is left
	v.open()
	v.measure()
	if grant, status := v.attest(nil); grant == nil {
		t.Fatalf("no grant: status %d", status)
	}
	v.ok("GET", bootmsg.PathKernel, nil, nil)
	rest := v.partOf(1 << 20)
	daemon.Stop(syscall.SIGKILL)
	if n, err := io.Copy(io.Discard, rest); err == nil || n >= int64(len(w.initrd))-1<<20 {
		t.Errorf("after the kill %d bytes more came, %v: the component looks whole", n, err)
	}

	w.launch(daemon)
	for _, path := range []string{bootmsg.PathKernel, bootmsg.PathInitramfs, bootmsg.PathUnique} {
		w.soon().refused("GET", path, nil)
	}
	v = w.soon()
	v.refused("POST", bootmsg.PathOpen, bootmsg.OpenRequest{Token: w.t1, VMKey: v.key})
	if n := refused.Load(); n != 1 {
		t.Errorf("the orchestrator refused the spent T1 %d times, want once", n)
	}
	w.orch.WaitEvent("refusal", func(e event.Event) bool { return e.Kind == "boot.refused" && e.Reason == event.TokenSpent })

	w.t1 = token.New(token.T1)
	v = w.soon()
	v.open()
	v.measure()
	if grant, _ := v.attest(nil); grant == nil {
		t.Fatal("no grant for the next VM")
	}
	for path, want := range map[string][]byte{bootmsg.PathKernel: w.kernel, bootmsg.PathInitramfs: w.initrd, bootmsg.PathUnique: w.unique} {
		var got []byte
		if v.ok("GET", path, nil, &got); !bytes.Equal(got, want) {
			t.Errorf("%s: other bytes", path)
		}
	}
	v.ok("POST", bootmsg.PathDone, bootmsg.DoneRequest{}, nil)
	if done := w.waitDone(); done.Reason != "" || len(done.Delivered) != 3 {
		t.Errorf("the next VM's end: %+v", done)
	}
}
