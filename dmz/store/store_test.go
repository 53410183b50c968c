package store

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"foothold/dmz/upstream/upstreamtest"
	"foothold/internal/mtls"
	"foothold/internal/nstest"
	"foothold/protocol/digest"
)

const dns = "store.foothold.internal"

type world struct {
	t        *testing.T
	orch     *upstreamtest.Orchestrator
	dmz, vms *upstreamtest.CA
	dir      string
	base     string
}

func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }

func newWorld(t *testing.T) *world {
	t.Helper()
	return newWorldIn(t, t.TempDir())
}

// newWorldIn is newWorld with the objects in dir.
func newWorldIn(t *testing.T, dir string) *world {
	orch := upstreamtest.New(t)
	w := &world{t: t, orch: orch, dmz: orch.DMZ, vms: upstreamtest.NewCA(t, "vm"), dir: dir}
	listen := func() net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	orch.Serve(listen())
	l := listen()
	w.base = "https://" + l.Addr().String()
	c := Config{State: w.dir, Listen: netip.MustParseAddrPort(l.Addr().String()), VMCA: w.vms.File(),
		TLS:      w.dmz.Files(upstreamtest.Leaf{ID: mtls.Identity{Role: mtls.Store, Name: "store"}, Server: true, DNS: dns}, w.dmz),
		Upstream: orch.Config(mtls.Store, "store")}
	l.Close()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Run(ctx, c) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	for range 100 {
		if c, err := net.Dial("tcp", c.Listen.String()); err == nil {
			c.Close()
			return w
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatal("store does not listen")
	return nil
}

// call returns what callAs does, of a caller named x.
func (w *world) call(ca *upstreamtest.CA, role, method, path string, body io.Reader) (int, []byte) {
	w.t.Helper()
	return w.callAs(ca, mtls.Identity{Role: role, Name: "x"}, method, path, body)
}

// callAs returns the status, 0 when the connection was refused, and the body.
func (w *world) callAs(ca *upstreamtest.CA, who mtls.Identity, method, path string, body io.Reader) (int, []byte) {
	w.t.Helper()
	cert := ca.Issue(upstreamtest.Leaf{ID: who})
	tr := &http.Transport{TLSClientConfig: mtls.ClientConfig(cert, w.dmz.Pool(), dns, mtls.Store)}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequest(method, w.base+path, body)
	if err != nil {
		w.t.Fatal(err)
	}
	res, err := (&http.Client{Transport: tr, Timeout: 10 * time.Second}).Do(req)
	if err != nil {
		return 0, nil
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return res.StatusCode, data
}

func TestWhoMayDoWhat(t *testing.T) {
	w := newWorld(t)
	object := bytes.Repeat([]byte("object"), 100_000)
	path := "/v1/objects/" + digest.Of(object).String()
	for _, c := range []struct {
		name string
		ca   *upstreamtest.CA
		role string
		verb string
		want int
	}{
		{"absent", w.dmz, mtls.BootServer, "GET", 404},
		{"put by boot server", w.dmz, mtls.BootServer, "PUT", 403},
		{"put by a VM", w.vms, mtls.VM, "PUT", 403},
		{"put by an orchestrator of the VMs' authority", w.vms, mtls.Orchestrator, "PUT", 0},
		{"put by a firewall", w.dmz, mtls.Firewall, "PUT", 0},
		{"put", w.dmz, mtls.Orchestrator, "PUT", 201},
		{"put again", w.dmz, mtls.Orchestrator, "PUT", 204},
		{"get by boot server", w.dmz, mtls.BootServer, "GET", 200},
		{"get by gateway", w.dmz, mtls.Gateway, "GET", 200},
		{"get by a VM", w.vms, mtls.VM, "GET", 200},
		{"head by a VM", w.vms, mtls.VM, "HEAD", 200},
		{"get by a VM of the DMZ's authority", w.dmz, mtls.VM, "GET", 0},
		{"get by a stranger's VM", upstreamtest.NewCA(t, "other"), mtls.VM, "GET", 0},
		{"delete", w.dmz, mtls.Orchestrator, "DELETE", 404},
	} {
		var body io.Reader
		if c.verb == "PUT" {
			body = bytes.NewReader(object)
		}
		status, data := w.call(c.ca, c.role, c.verb, path, body)
		if status != c.want {
			t.Errorf("%s: status %d, want %d", c.name, status, c.want)
		}
		if status == 200 && c.verb == "GET" && !bytes.Equal(data, object) {
			t.Errorf("%s: other bytes", c.name)
		}
	}
	for _, path := range []string{"/v1/objects/", "/v1/objects", "/", "/v1/objects/..%2f..%2fetc%2fpasswd", "/v1/objects/" + strings.ToUpper(digest.Of(object).String())} {
		if status, _ := w.call(w.dmz, mtls.BootServer, "GET", path, nil); status != 404 {
			t.Errorf("%s: status %d", path, status)
		}
	}
}

func TestWrongContentLeavesNothing(t *testing.T) {
	w := newWorld(t)
	path := "/v1/objects/" + digest.Of([]byte("right")).String()
	if status, _ := w.call(w.dmz, mtls.Orchestrator, "PUT", path, strings.NewReader("wrong")); status != 422 {
		t.Errorf("status %d", status)
	}
	if status, _ := w.call(w.dmz, mtls.Orchestrator, "PUT", path, io.MultiReader(strings.NewReader("right"))); status != 411 {
		t.Errorf("without a length: status %d", status)
	}
	// a sender that breaks off
	cert := w.dmz.Issue(upstreamtest.Leaf{ID: mtls.Identity{Role: mtls.Orchestrator, Name: "x"}})
	c, err := tls.Dial("tcp", strings.TrimPrefix(w.base, "https://"), mtls.ClientConfig(cert, w.dmz.Pool(), dns, mtls.Store))
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(c, "PUT "+path+" HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nri")
	c.Close()
	deadline := time.Now().Add(5 * time.Second)
	for {
		left, err := os.ReadDir(w.dir)
		if err != nil {
			t.Fatal(err)
		}
		if len(left) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("left: %v", left)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func TestStartRemovesInterruptedTransfers(t *testing.T) {
	dir := t.TempDir()
	name := digest.Of([]byte("a")).String()
	for _, f := range []string{"." + name + ".new-123", name} {
		if err := os.WriteFile(filepath.Join(dir, f), []byte("a"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := open(dir); err != nil {
		t.Fatal(err)
	}
	left, _ := os.ReadDir(dir)
	if len(left) != 1 || left[0].Name() != name {
		t.Errorf("left: %v", left)
	}
}
