//go:build system

package lab_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"foothold/lab"
	"foothold/lab/control"
)

// dialVariable makes this test's program a prober: it connects to the address and
// says by its exit code whether something accepted.
const dialVariable = "FOOTHOLD_TEST_DIAL"

// patienceVariable says how long: what is to pass may be slow on a busy machine, where a first
// packet is lost and comes again after a second.
const patienceVariable = "FOOTHOLD_TEST_DIAL_FOR"

// How long a prober waits for what is to pass, and for what is not.
const (
	passes  = 20 * time.Second
	refused = 700 * time.Millisecond
)

var binaries string // folder of foothold and the rest

func TestMain(m *testing.M) {
	if address := os.Getenv(dialVariable); address != "" {
		patience, err := time.ParseDuration(os.Getenv(patienceVariable))
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
		conn, err := net.DialTimeout("tcp", address, patience)
		if err != nil {
			os.Exit(1)
		}
		conn.Close()
		os.Exit(0)
	}
	if dir := os.Getenv(quoteVariable); dir != "" {
		if err := printQuote(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "lab-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binaries = dir
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", dir+"/", "./cmd/...")
	build.Dir = ".."
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build:", err)
		return 1
	}
	return m.Run()
}

// testLab is a lab in a directory of the test's own.
type testLab struct {
	t   *testing.T
	dir string
}

func newLab(t *testing.T) *testLab {
	t.Helper()
	l := &testLab{t, filepath.Join(t.TempDir(), "lab")}
	t.Setenv("XDG_STATE_HOME", t.TempDir()) // the remembered context is not the user's
	t.Cleanup(func() { exec.Command(filepath.Join(binaries, "foothold"), "lab", "down", "--state", l.dir).Run() })
	return l
}

// run runs `foothold lab VERB --state DIR ...` and returns output and exit code.
func (l *testLab) run(stdin string, verb string, args ...string) (stdout, stderr string, code int) {
	l.t.Helper()
	cmd := exec.Command(filepath.Join(binaries, "foothold"), append([]string{"lab", verb, "--state", l.dir}, args...)...)
	var out, complaints bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &complaints
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		l.t.Fatal(err)
	}
	return out.String(), complaints.String(), cmd.ProcessState.ExitCode()
}

func (l *testLab) must(verb string, args ...string) string {
	l.t.Helper()
	out, complaints, code := l.run("", verb, args...)
	if code != 0 {
		l.t.Fatalf("lab %s %v: exit code %d: %s", verb, args, code, complaints)
	}
	return out
}

func (l *testLab) status() control.Status {
	l.t.Helper()
	var st control.Status
	if err := json.Unmarshal([]byte(l.must("status", "--json")), &st); err != nil {
		l.t.Fatal(err)
	}
	return st
}

func (l *testLab) reaches(place, address string, patience time.Duration) bool {
	l.t.Helper()
	self, err := os.Executable()
	if err != nil {
		l.t.Fatal(err)
	}
	_, complaints, code := l.run("", "exec", place, "--", "env", dialVariable+"="+address, patienceVariable+"="+patience.String(), self)
	if code != 0 && code != 1 {
		l.t.Fatalf("probe %s from %s: exit code %d: %s", address, place, code, complaints)
	}
	return code == 0
}

// traces is what the machine shows of labs: mounts, interfaces and rules of this
// network namespace, and processes that name the directory.
func traces(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	b.Write(mounts)
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		fmt.Fprintln(&b, link.Index, link.Name)
	}
	if names, err := os.ReadDir("/run/netns"); err == nil {
		fmt.Fprintln(&b, names)
	}
	for _, p := range processes(t, dir) {
		fmt.Fprintln(&b, p)
	}
	return b.String()
}

func processes(t *testing.T, dir string) []string {
	t.Helper()
	var found []string
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err == nil && bytes.Contains(data, []byte(dir)) {
			found = append(found, filepath.Dir(file)+" "+string(bytes.ReplaceAll(data, []byte{0}, []byte(" "))))
		}
	}
	return found
}

func TestUpAndDownLeaveNothing(t *testing.T) {
	l := newLab(t)
	before := traces(t, l.dir)
	context := strings.TrimSpace(l.must("up"))
	if context != filepath.Join(l.dir, "context.yaml") {
		t.Errorf("up names %q as its context", context)
	}
	st := l.status()
	if len(st.Daemons) != 8 || st.PID == 0 {
		t.Errorf("status: %+v", st)
	}
	for _, d := range st.Daemons {
		if d.State != control.Serving || d.Restarts != 0 {
			t.Errorf("%s: %s after %d restarts (%s)", d.Name, d.State, d.Restarts, d.LastExit)
		}
	}
	if out := l.must("up"); strings.TrimSpace(out) != context {
		t.Errorf("a second up prints %q", out)
	}
	t.Run("exec", l.testExec)
	t.Run("reach", l.testReach)
	t.Run("fences", l.testFences)
	t.Run("modes", l.testModes)
	t.Run("stranger", l.testStranger)
	t.Run("restart", l.testRestart)
	l.must("down")
	if after := traces(t, l.dir); after != before {
		t.Errorf("down left something:\nbefore:\n%s\nafter:\n%s", before, after)
	}
	if _, complaints, code := l.run("", "status"); code == 0 || !strings.Contains(complaints, "lab up") {
		t.Errorf("status of a lab that is down: %d %s", code, complaints)
	}
	l.must("down") // once more is no error
}

func (l *testLab) testExec(t *testing.T) {
	out, complaints, code := l.run("some input", "exec", lab.Tenant, "--", "sh", "-c", "cat; echo problem >&2; exit 7")
	if out != "some input" || complaints != "problem\n" || code != 7 {
		t.Errorf("exec: %q %q %d", out, complaints, code)
	}
	if _, _, code := l.run("", "exec", lab.Tenant, "--", "sh", "-c", "kill -9 $$"); code != 128+9 {
		t.Errorf("a killed command: exit code %d", code)
	}
	if _, complaints, code := l.run("", "exec", "nowhere", "--", "true"); code != 127 || !strings.Contains(complaints, "nowhere") {
		t.Errorf("an unknown place: %d %s", code, complaints)
	}
	if out := l.must("exec", lab.External, "--", "ip", "-4", "-o", "addr", "show", "dev", lab.CloudInterface); !strings.Contains(out, "10.82.0.1/24") {
		t.Errorf("address of the external firewall: %s", out)
	}
	l.t = t
	// A client that goes away takes its command along.
	cmd := exec.Command(filepath.Join(binaries, "foothold"), "lab", "exec", "--state", l.dir, lab.Tenant, "--", "sleep", "4567")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	sleeping := func() bool {
		_, _, code := l.run("", "exec", lab.Tenant, "--", "pgrep", "-f", "^sleep 4567")
		return code == 0
	}
	eventually(t, "the command runs", sleeping)
	cmd.Process.Kill()
	cmd.Wait()
	eventually(t, "the command ended with its client", func() bool { return !sleeping() })
}

// testReach checks the traffic between places when no VM is there: only what the
// daemons need passes the firewalls.
func (l *testLab) testReach(t *testing.T) {
	l.t = t
	for _, c := range []struct {
		from, to string
		want     bool
	}{
		{lab.Tenant, "10.80.0.20:80", true},       // intranet, same network
		{lab.Tenant, "10.83.0.10:8443", true},     // host API
		{lab.Tenant, "10.81.0.30:8443", true},     // store
		{lab.BootServer, "10.80.0.10:8443", true}, // orchestrator
		{lab.Gateway, "10.80.0.10:8443", true},
		{lab.External, "10.80.0.10:8443", true},
		{lab.Store, "10.80.0.10:8443", true}, // with what it refused
		{lab.Tenant, "10.81.0.10:443", false},
		{lab.Tenant, "10.82.0.200:22", false},
		{lab.BootServer, "10.80.0.20:80", false},
		{lab.BootServer, "10.83.0.10:8443", false},
		{lab.Gateway, "10.80.0.20:80", false},
		{lab.Store, "10.80.0.20:80", false},
		{lab.Store, "10.83.0.10:8443", false},
		{lab.Host, "10.80.0.10:8443", false},
		{lab.Host, "10.80.0.20:80", false},
		{lab.Neighbour, "10.81.0.10:443", false},
		{lab.Neighbour, "10.81.0.20:8443", false},
		{lab.Neighbour, "10.81.0.30:8443", false},
		{lab.Neighbour, "10.80.0.10:8443", false},
		{lab.Neighbour, "10.80.0.20:80", false},
		{lab.Neighbour, "10.83.0.10:8443", false},
		{lab.Intranet, "10.81.0.30:8443", false},
		{lab.Intranet, "10.83.0.10:8443", false},
	} {
		patience := refused
		if c.want {
			patience = passes
		}
		if got := l.reaches(c.from, c.to, patience); got != c.want {
			t.Errorf("%s reaches %s: %v, want %v", c.from, c.to, got, c.want)
		}
	}
}

// testFences looks at the daemons' processes: what they see and what they may.
func (l *testLab) testFences(t *testing.T) {
	l.t = t
	const netAdmin = 1 << 12
	keeps := map[string]uint64{lab.External: netAdmin, lab.Internal: netAdmin, lab.Gateway: netAdmin, "host": netAdmin} // others none
	for _, d := range l.status().Daemons {
		show := func(command string) string {
			return l.must("exec", d.Place, "--", "sh", "-c", strings.ReplaceAll(command, "PID", strconv.Itoa(d.PID)))
		}
		if out := show("grep NoNewPrivs /proc/PID/status"); !strings.Contains(out, "1") {
			t.Errorf("%s may gain privileges: %s", d.Name, out)
		}
		if fields := strings.Fields(show("grep Seccomp: /proc/PID/status")); !slices.Equal(fields, []string{"Seccomp:", "2"}) {
			t.Errorf("%s may make every system call: %s", d.Name, fields)
		}
		for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
			mask, err := strconv.ParseUint(strings.Fields(show("grep " + set + " /proc/PID/status"))[1], 16, 64)
			if want := keeps[d.Name]; err != nil || mask&^want != 0 || set == "CapEff" && mask != want {
				t.Errorf("%s: %s is %x, want %x (%v)", d.Name, set, mask, want, err)
			}
		}
		if out := show("grep 'core file' /proc/PID/limits"); !strings.Contains(strings.Join(strings.Fields(out), " "), "size 0 0") {
			t.Errorf("%s may leave a core file: %s", d.Name, out)
		}
		// A process of the same user without privileges, as all of them are.
		if _, _, code := l.run("", "exec", d.Place, "--", "setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs",
			"head", "-c0", fmt.Sprintf("/proc/%d/environ", d.PID)); code == 0 {
			t.Errorf("others of its user read the memory of %s", d.Name)
		}
		var own []string // folders with keys that it sees
		for _, folder := range []string{"tenant", "provider", "dmz/gateway", "dmz/store", "dmz/bootserver", "dmz/external", "dmz/internal"} {
			if _, _, code := l.run("", "exec", d.Place, "--", "ls", fmt.Sprintf("/proc/%d/root%s/%s", d.PID, l.dir, folder)); code == 0 {
				own = append(own, folder)
			}
		}
		if len(own) > 1 {
			t.Errorf("%s sees %v", d.Name, own)
		}
	}
}

func (l *testLab) testRestart(t *testing.T) {
	l.t = t
	find := func(name string) control.Daemon {
		for _, d := range l.status().Daemons {
			if d.Name == name {
				return d
			}
		}
		t.Fatalf("no daemon %s", name)
		return control.Daemon{}
	}
	for _, name := range []string{"store", "host"} {
		before := find(name)
		l.must("restart", "--signal", "9", name)
		eventually(t, name+" serves again", func() bool {
			d := find(name)
			return d.Restarts == before.Restarts+1 && d.State == control.Serving && d.PID != before.PID
		})
	}
}

func TestTwoLabsDoNotDisturbEachOther(t *testing.T) {
	a, b := newLab(t), newLab(t)
	a.must("up")
	b.must("up")
	if x, y := a.status(), b.status(); x.API == y.API || x.PID == y.PID {
		t.Errorf("two labs share %s or process %d", x.API, x.PID)
	}
	b.must("down")
	for _, d := range a.status().Daemons {
		if d.State != control.Serving {
			t.Errorf("%s is %s after the other lab's end", d.Name, d.State)
		}
	}
	if !a.reaches(lab.Tenant, "10.80.0.20:80", passes) {
		t.Error("the other lab's end took a network along")
	}
}

func TestUpAfterKill(t *testing.T) {
	l := newLab(t)
	before := traces(t, l.dir)
	l.must("up")
	first := l.status()
	if err := syscall.Kill(first.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "everything ended with the first process", func() bool { return traces(t, l.dir) == before })
	// As after a power cut: socket, record and lock file lie there still.
	for _, name := range []string{control.SocketFile, "lock"} {
		if _, err := os.Lstat(filepath.Join(l.dir, "run", name)); err != nil {
			t.Errorf("the crash left no %s to stumble over", name)
		}
	}
	l.must("up")
	second := l.status()
	if second.PID == first.PID || second.API != first.API {
		t.Errorf("after the crash: process %d, API %s; before: %d, %s", second.PID, second.API, first.PID, first.API)
	}
	l.must("down")
	if after := traces(t, l.dir); after != before {
		t.Errorf("down left something:\n%s", after)
	}
}

func TestInterruptedUpLeavesNothing(t *testing.T) {
	l := newLab(t)
	before := traces(t, l.dir)
	cmd := exec.Command(filepath.Join(binaries, "foothold"), "lab", "up", "--state", l.dir)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the supervisor runs", func() bool { return len(processes(t, l.dir)) > 1 })
	cmd.Process.Signal(os.Interrupt)
	if err := cmd.Wait(); err == nil {
		t.Error("an interrupted up reports success")
	}
	eventually(t, "no process is left", func() bool { return len(processes(t, l.dir)) == 0 })
	if after := traces(t, l.dir); after != before {
		t.Errorf("it left something:\nbefore:\n%s\nafter:\n%s", before, after)
	}
	l.must("up")
}

// eventually polls for a state that is reached by other processes.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}
