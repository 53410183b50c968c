//go:build system

package e2e

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"foothold/client"
	"foothold/lab"
	"foothold/lab/ground"
	"foothold/protocol/api"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/pcr"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"golang.org/x/sys/unix"
)

// This file has a host that changes while a VM computes there: what is closed, what is kept
// and told, and how it goes on.

// hostChanges changes the host under a computing VM that asks for the intranet's page over and
// over, and has it quoted. The VM is closed: it is not reached and reaches nothing, while its
// instance runs on and tries to. That is told, and can be audited. In the end the instance is
// destroyed by wish, the host boots as it was agreed and is readmitted, and the VM is started.
func (s *system) hostChanges(t *testing.T, c *client.Client, vm api.VM) {
	t.Helper()
	intranet := "http://" + lab.Address(lab.Intranet, lab.TenantLAN).String() + "/"
	if r := s.fetch(t, lab.Tenant, strings.TrimSuffix(vm.WorkloadURL, "/")+"/ask?"+url.Values{"for": {intranet}}.Encode()); r.code != 0 {
		t.Fatalf("%s is to ask for a page: exit code %d\n%s%s", vm.Name, r.code, r.stdout, r.stderr)
	}
	s.countPackets(t, vm)
	s.within(t, "it began to ask", func(t *testing.T) string {
		if n := s.packets(t); n[lab.External] == 0 || n[lab.Gateway] == 0 || n[lab.Intranet] == 0 {
			return "a place that none of its packets reaches"
		}
		return ""
	})
	if held := s.held(t, vm); len(held) != 3 {
		t.Fatalf("while it computes, rules or a peer are in %q alone: the check below would show nothing", held)
	}

	// 1. The host runs something else. Whoever asks is told so, and all is closed.
	s.extendPlatform(t)
	r := s.run(t.Context(), "vm", "attest", vm.Name)
	if r.code != 3 || !strings.Contains(r.stdout, changedRegisters) {
		t.Fatalf("the quote of a changed host: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	for told := time.Now(); ; { // much sooner than the lease would end it
		held := s.held(t, vm)
		if len(held) == 0 {
			t.Logf("closed %.1f s after the refusal was told", time.Since(told).Seconds())
			break
		}
		if time.Since(told) > closingSlack {
			t.Errorf("%v after the refusal it is still in %q", closingSlack, held)
			break
		}
	}

	// 2. Nothing comes in or out, while it runs on and tries.
	before := s.packets(t)
	page := s.tryFetch(t, vm.WorkloadURL)
	after := s.packets(t)
	t.Logf("packets of a closed VM in %v: %v, then %v", fetchLimit, before, after)
	if page.code == 0 {
		t.Errorf("its page still comes:\n%s", page.stdout)
	}
	if after[lab.External] == before[lab.External] {
		t.Error("its instance sends nothing any more: that nothing arrives shows nothing")
	}
	if after[lab.Gateway] != before[lab.Gateway] || after[lab.Intranet] != before[lab.Intranet] {
		t.Error("its packets still reach the gateway, or the intranet through its tunnel")
	}
	if n := s.machines(t); n != 1 {
		t.Errorf("%d QEMU processes run, want the one that is kept", n)
	}

	// 3. People are told, and what was decided can be derived again.
	s.toldClosed(t, c, vm)
	s.auditRefusal(t, vm)

	// 4. The first wish has the instance destroyed; the next start needs a host in order.
	s.must(t, "vm", "stop", vm.Name, "--wait")
	s.staysStopped(t, c, vm.Name, event.StopAsked)
	s.still(t, c, vm.Name)
	s.bootHost(t)
	s.asAgreed(t)
	s.must(t, "host", "readmit", ground.HostName)
	if out := s.must(t, "host", "list"); !strings.Contains(out, "good") {
		t.Errorf("the host after all:\n%s", out)
	}
	s.must(t, "vm", "start", vm.Name)
}

// changedRegisters is the finding of a register that was extended by what no log has.
const changedRegisters = "neither the host's log nor its claims lead to them"

// toldClosed checks what people see of a closed VM.
func (s *system) toldClosed(t *testing.T, c *client.Client, vm api.VM) {
	t.Helper()
	now, err := c.VM(t.Context(), vm.Name)
	if err != nil || now.Phase != client.PhaseStopped || now.Reason != event.QuoteRefused || now.Start != vm.Start || now.Cleanup != "" || !now.NextStart.IsZero() || len(now.Findings) == 0 {
		t.Errorf("the closed VM: %+v, %v", now, err)
	}
	for _, say := range []struct {
		args []string
		want []string
	}{
		{[]string{"vm", "show", vm.Name}, []string{"it is closed", "its instance is kept", changedRegisters}},
		{[]string{"vm", "explain", vm.Name}, []string{"it is closed", changedRegisters, "vm evidence web --out", "vm stop web", "vm start web", "vm delete web"}},
		{[]string{"events", "--vm", vm.Name}, []string{"vm.quote-refused"}},
	} {
		out := s.must(t, say.args...)
		for _, want := range say.want {
			if !strings.Contains(out, want) {
				t.Errorf("foothold %s does not say %q:\n%s", strings.Join(say.args, " "), want, out)
			}
		}
	}
	if out := s.must(t, "host", "list"); strings.Contains(out, "good") {
		t.Errorf("the changed host is in good standing:\n%s", out)
	}
	f, err := c.Fsck(t.Context())
	if err != nil || !f.Clean || !slices.ContainsFunc(f.Notes, func(n api.Finding) bool { return n.Code == "vm-closed" }) {
		t.Errorf("fsck of a closed VM: %+v, %v", f, err)
	}
}

// auditRefusal audits the evidence of a closed VM by the keys that the tenant pins: the last
// verdict is refused, rightly, and not if it says something else.
func (s *system) auditRefusal(t *testing.T, vm api.VM) {
	t.Helper()
	dir, verify := s.exported(t, vm.Name)
	r := verify(false)
	if r.code != 3 || strings.Count(r.stdout, "refused, rightly") != 1 || !strings.Contains(r.stdout, changedRegisters) {
		t.Errorf("evidence of the refusal: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*-watch-*.json"))
	if err != nil || len(files) == 0 {
		t.Fatalf("files of the watch's quotes: %q, %v", files, err)
	}
	last := slices.Max(files)
	data, err := os.ReadFile(last)
	if err != nil {
		t.Fatal(err)
	}
	other := bytes.Replace(data, []byte(`"accepted":false`), []byte(`"accepted":true`), 1)
	if bytes.Equal(other, data) {
		t.Fatalf("%s does not say that it is refused", last)
	}
	if err := os.WriteFile(last, other, 0o644); err != nil {
		t.Fatal(err)
	}
	if r := verify(false); r.code != 1 {
		t.Errorf("as if it had been accepted: exit code %d\n%s", r.code, r.stdout)
	}
}

// counting is the name of the table in which a place's kernel counts a VM's packets.
const counting = "counting"

// countPackets has kernels count a VM's packets: the external firewall's what it sends, the
// gateway's what comes from there, the intranet's what comes through the tunnel. Nothing
// is dropped by that.
func (s *system) countPackets(t *testing.T, vm api.VM) {
	t.Helper()
	for place, from := range map[string]netip.Addr{lab.External: vm.Address, lab.Gateway: vm.Address, lab.Intranet: vm.TunnelAddress} {
		s.must(t, "lab", "exec", "--state", s.state, place, "--", "nft", "add table ip "+counting+
			"; add chain ip "+counting+" seen { type filter hook prerouting priority -400; }; add rule ip "+counting+" seen ip saddr "+from.String()+" counter")
	}
}

var counted = regexp.MustCompile(`counter packets ([0-9]+) `)

// packets are those that were counted so far, by place.
func (s *system) packets(t *testing.T) map[string]int {
	t.Helper()
	list := map[string]int{}
	for _, place := range []string{lab.External, lab.Gateway, lab.Intranet} {
		out := s.must(t, "lab", "exec", "--state", s.state, place, "--", "nft", "list", "table", "ip", counting)
		found := counted.FindStringSubmatch(out)
		if found == nil {
			t.Fatalf("%s counts nothing:\n%s", place, out)
		}
		n, err := strconv.Atoi(found[1])
		if err != nil {
			t.Fatal(err)
		}
		list[place] = n
	}
	return list
}

// extendPlatform extends the register of the platform's files by one that is not the
// platform's, as a kernel does before it runs one. The emulated TPM serves one connection:
// the agent's, which is borrowed while the agent stands still.
func (s *system) extendPlatform(t *testing.T) {
	t.Helper()
	pid := s.agentProcess(t)
	for range 100 {
		if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		done, err := extendThrough(pid, digest.Of([]byte("a program that nobody agreed to")))
		if err := errors.Join(err, unix.Kill(pid, unix.SIGCONT)); err != nil {
			t.Fatal(err)
		}
		if done {
			return
		}
	}
	t.Fatal("the agent's connection to its TPM is never idle")
}

// agentProcess is the host agent's process.
func (s *system) agentProcess(t *testing.T) int {
	t.Helper()
	home := s.namespace(t)
	for _, pid := range processes() {
		line, _ := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
		ns, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), "ns/pid"))
		if err == nil && ns == home && bytes.Contains(line, []byte("foothold-host\x00run\x00")) {
			return pid
		}
	}
	t.Fatal("no process is the host's agent")
	return 0
}

// idleTPM is how long nothing must come from the TPM to a process that stands still, before
// its connection is taken for one on which no answer is awaited: a command takes milliseconds.
// tpmLimit is how long one of ours may take.
const (
	idleTPM  = 200 * time.Millisecond
	tpmLimit = 10 * time.Second
)

// extendThrough extends the register through a stopped process's connection to the TPM. It
// does nothing, and says so, if the process awaits an answer.
func extendThrough(pid int, sum digest.SHA256) (done bool, err error) {
	conn, err := tpmConnection(pid)
	if err != nil {
		return false, err
	}
	defer conn.Close() // a duplicate: the process's own stays open
	raw, err := conn.SyscallConn()
	if err != nil {
		return false, err
	}
	ready, pollErr := 0, error(nil)
	err = raw.Control(func(fd uintptr) {
		ready, pollErr = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(idleTPM.Milliseconds()))
	})
	if err := errors.Join(err, pollErr); err != nil || ready != 0 {
		if errors.Is(err, unix.EINTR) {
			err = nil
		}
		return false, err
	}
	_, err = tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr.Platform), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: sum[:]}}},
	}.Execute(transport.FromReadWriter(conn))
	return err == nil, err
}

// tpmConnection duplicates a process's connection to the TPM.
func tpmConnection(pid int) (*net.UnixConn, error) {
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(process)
	files, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(pid), "fd"))
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		n, err := strconv.Atoi(f.Name())
		if err != nil {
			return nil, err
		}
		fd, err := unix.PidfdGetfd(process, n, 0)
		if err != nil {
			return nil, err
		}
		file := os.NewFile(uintptr(fd), "TPM")
		peer, err := unix.Getpeername(fd)
		if at, ok := peer.(*unix.SockaddrUnix); err != nil || !ok || at.Name != ground.TPMSocket {
			file.Close()
			continue
		}
		conn, err := net.FileConn(file)
		file.Close()
		if err != nil {
			return nil, err
		}
		tpm, ok := conn.(*net.UnixConn)
		if !ok {
			return nil, errors.New("the connection to the TPM is none of a socket")
		}
		return tpm, tpm.SetDeadline(time.Now().Add(tpmLimit))
	}
	return nil, errors.New("the process has no connection to " + ground.TPMSocket)
}
