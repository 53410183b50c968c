package facts

import (
	"encoding/binary"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"foothold/internal/nstest"
	"foothold/protocol/audit"
	"foothold/protocol/digest"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }

// gather audits this machine as it is, in a network namespace of its own. Device-mapper
// tables need root of the whole machine; the tests of VMs see those.
func gather(t *testing.T, g *Gatherer, scopes ...Scope) audit.Report {
	t.Helper()
	r := audit.Report{}
	var err error
	if r.Files, err = g.files(scopes); err != nil {
		t.Fatal(err)
	}
	for name, step := range map[string]func(*audit.Report) error{"kernel": kernel, "modules": modules, "listeners": listeners,
		"mounts": mounts, "users": users, "network": network, "swaps": swaps} {
		if err := step(&r); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	return r
}

// cover puts a text in a file's place, in this test's own mounts: an ordinary user
// cannot read the machine's shadow file, even as root of a namespace.
func cover(t *testing.T, path, text string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "cover")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(file, path, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })
}

// Each thing that appears on the machine appears in the report.
func TestEveryChangeShows(t *testing.T) {
	g := &Gatherer{}
	dir := t.TempDir()
	cover(t, "/etc/passwd", "root:x:0:0:root:/root:/bin/bash\nopen:x:1000:1000::/:/bin/sh\nold:*:5:5::/:/bin/sh\nnone:x:6:6::/:/bin/false\n")
	cover(t, "/etc/shadow", "root:!:1::::::\nopen:$y$j9T$:1::::::\n")
	scope := Scope{dir, "/etc"}
	before := gather(t, g, scope)

	os.WriteFile(filepath.Join(dir, "file"), []byte("x"), 0o755)
	os.Symlink("/bin/sh", filepath.Join(dir, "link"))
	l, err := net.Listen("tcp4", "0.0.0.0:2222")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	u, err := net.ListenPacket("udp4", "127.0.0.1:5353")
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "extra0"
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		t.Fatal(err)
	}
	link, _ := netlink.LinkByName("extra0")
	addr, _ := netlink.ParseAddr("192.0.2.1/24")
	if err := netlink.AddrAdd(link, addr); err != nil {
		t.Fatal(err)
	}
	netlink.LinkSetUp(link)
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.IPv4(192, 0, 2, 9)}); err != nil {
		t.Fatal(err)
	}
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.IPv4(192, 0, 2, 9), Table: 77}); err != nil {
		t.Fatal(err)
	}

	after := gather(t, g, scope)
	self, _ := os.Readlink("/proc/self/exe")
	want := audit.File{Path: "/etc/file", Mode: 0o100755, SHA256: digest.Of([]byte("x"))}
	if slices.Contains(before.Files, want) || !slices.Contains(after.Files, want) {
		t.Errorf("files: %+v", after.Files)
	}
	if !slices.ContainsFunc(after.Files, func(f audit.File) bool { return f.Path == "/etc/link" && f.SHA256 == digest.Of([]byte("/bin/sh")) }) {
		t.Error("the link is not listed")
	}
	for _, l := range []audit.Listener{{Proto: "tcp", Address: "0.0.0.0", Port: 2222, Exe: self}, {Proto: "udp", Address: "127.0.0.1", Port: 5353, Exe: self}} {
		if slices.Contains(before.Listeners, l) || !slices.Contains(after.Listeners, l) {
			t.Errorf("%+v is not listed: %+v", l, after.Listeners)
		}
	}
	for _, r := range []string{"192.0.2.0/24 dev extra0", "default via 192.0.2.9 dev extra0", "default via 192.0.2.9 dev extra0 table 77"} {
		if slices.Contains(before.Routes, r) || !slices.Contains(after.Routes, r) {
			t.Errorf("route %q is not listed: %q", r, after.Routes)
		}
	}
	if !slices.ContainsFunc(after.Interfaces, func(i audit.Interface) bool {
		return i.Name == "extra0" && i.Up && slices.Contains(i.Addresses, "192.0.2.1/24")
	}) {
		t.Errorf("interfaces: %+v", after.Interfaces)
	}
	if want := []audit.User{{Name: "root", Shell: "/bin/bash", Locked: true}, {Name: "open", UID: 1000, Shell: "/bin/sh"},
		{Name: "old", UID: 5, Shell: "/bin/sh", Locked: true}, {Name: "none", UID: 6, Shell: "/bin/false"}}; !slices.Equal(after.Users, want) {
		t.Errorf("users: %+v", after.Users)
	}
	exe, _ := os.ReadFile("/proc/self/exe")
	// Others' executables cannot be read from this namespace.
	if p, kernel, err := g.process(os.Getpid()); err != nil || kernel || p.PID != os.Getpid() || p.Exe != self || p.SHA256 != digest.Of(exe) || !slices.Equal(p.Args, os.Args) {
		t.Errorf("this process is shown as %+v, %v", p, err)
	}
	if !slices.ContainsFunc(after.Mounts, func(m audit.Mount) bool { return m.Target == "/proc" && m.Type == "proc" }) {
		t.Error("/proc is not listed")
	}
}

// A known digest is not reused for a file whose content changed.
func TestChangedContentIsReadAgain(t *testing.T) {
	g := &Gatherer{}
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	os.WriteFile(path, []byte("one"), 0o600)
	g.Warm([]Scope{{dir, "/"}})
	f, _ := os.OpenFile(path, os.O_WRONLY, 0)
	f.WriteAt([]byte("two"), 0)
	f.Close()
	files, err := g.files([]Scope{{dir, "/"}})
	if err != nil || len(files) != 1 || files[0].SHA256 != digest.Of([]byte("two")) {
		t.Errorf("%+v, %v", files, err)
	}
}

func TestParsers(t *testing.T) {
	if s, p, f, err := parseStat("7 (a) b (c)) S 1 7 7 0 -1 2097152 0"); err != nil || s != "S" || p != 1 || f&kthread == 0 {
		t.Errorf("%s %d %x %v", s, p, f, err)
	}
	if a, err := parseAddress("0100007F"); err != nil || a.String() != "127.0.0.1" {
		t.Errorf("%v %v", a, err)
	}
	if a, err := parseAddress("00000000000000000000000001000000"); err != nil || a.String() != "::1" {
		t.Errorf("%v %v", a, err)
	}
	if s := unescape(`/a\040b\134c`); s != `/a b\c` {
		t.Errorf("%q", s)
	}
}

func dmAnswer(kind, params string) []byte {
	buf := make([]byte, 1024)
	binary.NativeEndian.PutUint32(buf[dmDataStart:], dmHeader)
	binary.NativeEndian.PutUint32(buf[dmTargets:], 1)
	target := buf[dmHeader:]
	binary.NativeEndian.PutUint64(target[8:], 2048)
	binary.NativeEndian.PutUint32(target[20:], 512)
	copy(target[24:], kind)
	copy(target[40:], params)
	return buf
}

func TestTableHidesTheKey(t *testing.T) {
	got, err := parseTable(dmAnswer("crypt", "aes-xts-plain64 deadbeef 0 254:0 0 1 sector_size:4096"))
	if err != nil || strings.Contains(got, "deadbeef") || got != "0 2048 crypt aes-xts-plain64 - 0 254:0 0 1 sector_size:4096" {
		t.Errorf("%q, %v", got, err)
	}
}

func FuzzTable(f *testing.F) {
	f.Add(dmAnswer("crypt", "aes-xts-plain64 deadbeef 0 254:0 0"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) >= dmHeader {
			_, _ = parseTable(data)
		}
	})
}

func FuzzSocket(f *testing.F) {
	f.Add("  0: 0100007F:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1234 1")
	f.Fuzz(func(t *testing.T, line string) { _, _, _, _ = parseSocket("tcp", line) })
}
