//go:build system

package e2e

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"foothold/client"
	"foothold/e2e/hunt"
	"foothold/internal/luks"
	"foothold/internal/secret"
	"foothold/lab/control"
	"foothold/protocol/api"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/token"
	"foothold/tenant/ledger"
)

// This file looks for what is left of starts that are over, one that ended well and two that
// failed, while daemons and a VM's process are ended by signals that leave core files. Nothing
// of them is in any file, nor in a VM's memory, the next start's own included. What passed
// through a daemon's memory may still be there, see ARCHITECTURE.md, until that daemon ends.

const formerly = " of the start before"

// restarted starts the VM again and hunts for what was its first start's. It returns what is
// its second's.
func (h *hunter) restarted(t *testing.T, vm api.VM, first []secretsOf, collected []hunt.Secret, planted planted) []secretsOf {
	c := h.s.client(t)
	again := h.collect(t, func() {
		h.s.must(t, "vm", "restart", "web")
		ctx, cancel := context.WithTimeout(t.Context(), startLimit)
		defer cancel()
		var err error
		if vm, err = c.WaitStart(ctx, "web", 2, nil); err != nil {
			t.Fatalf("%v\n%s", err, h.s.run(t.Context(), "vm", "explain", "web").stdout)
		}
	})
	second := h.ofStart(t, vm, again)

	// Tokens are found by their form as well: the second start's may be where they are now.
	var all []secretsOf
	for _, one := range second {
		switch one.what {
		case "T1", "T2", "T3":
			all = append(all, secretsOf{what: one.what, may: append(slices.Clip(one.may), "memory VM")})
		case "VM's key":
			all = append(all, secretsOf{one.what, one.secrets, []string{"memory VM"}})
		}
	}
	for _, one := range first {
		former := secretsOf{what: one.what + formerly, may: over(one.may)}
		for _, s := range one.secrets {
			s.Name += formerly
			former.secrets = append(former.secrets, s)
		}
		all = append(all, former)
	}
	all = append(all, planted.hunted()...)
	daemons := h.daemons(t)
	finds := h.search(t, all, 0)
	planted.judge(t, finds)
	h.judge(t, all, finds, daemons)
	if !slices.ContainsFunc(finds, func(f hunt.Find) bool { return f.Secret == "VM's key" && h.where(f, daemons) == "memory VM" }) {
		t.Error("the VM's key is not found in the VM's memory: the search of that shows nothing")
	}
	h.void(t, vm, first)
	h.told(t, first, "web", vm.ID)

	// A header opens by its own start's passphrases alone.
	for i, headers := range [][]hunt.Secret{collected, again} {
		for j, phrases := range [][]hunt.Secret{collected, again} {
			if n := len(opened(t, headers, phrases)); i == j && n != 2 || i != j && n != 0 {
				t.Errorf("the passphrases of start %d open %d headers of start %d", j+1, n, i+1)
			}
		}
	}
	return second
}

// same reports whether two secrets are one, or two headers of one UUID: memory that is used
// again may have changed behind a header's end.
func same(a, b hunt.Secret) bool {
	const begin, end = 168, 208 // "LUKS2 On-Disk Format Specification" 1.1, section 2.1
	if a.Name == "header" && b.Name == "header" {
		return bytes.Equal(a.Value[begin:end], b.Value[begin:end])
	}
	return bytes.Equal(a.Value, b.Value)
}

// opened are the headers that any of the passphrases opens, one of each UUID. Opening takes
// every byte but the filling: so these are whole, whatever became of other copies.
func opened(t *testing.T, headers, phrases []hunt.Secret) (list []hunt.Secret) {
	t.Helper()
	for _, h := range headers {
		for _, p := range phrases {
			if h.Name != "header" || p.Name != "passphrase" {
				continue
			}
			key, err := luks.Unlock(h.Value, secret.New(bytes.Clone(p.Value)))
			if errors.Is(err, luks.ErrPassphrase) {
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			key.Wipe()
			if !slices.ContainsFunc(list, func(other hunt.Secret) bool { return same(h, other) }) {
				list = append(list, h)
			}
		}
	}
	return list
}

// headerPieces are random parts of a header: its salt, and both ends of its key slot's area
// ("LUKS2 On-Disk Format Specification" 1.1, sections 2.1 and 4.1).
func headerPieces(header []byte) (list []hunt.Secret) {
	const salt, area, size, piece = 104, 32 << 10, luks.KeySize * 4000, 64 // bytes
	for _, at := range []int{salt, area, area + size - piece} {
		list = append(list, hunt.Secret{Name: "headers", Value: header[at : at+piece]})
	}
	return list
}

// void presents every token to a copy of the ledger.
func (h *hunter) void(t *testing.T, vm api.VM, all []secretsOf) {
	t.Helper()
	l := h.copyLedger(t)
	defer l.Close()
	for _, one := range all {
		for _, s := range one.secrets {
			kind := map[string]token.Kind{"T1": token.T1, "T2": token.T2, "T3": token.T3}[s.Name]
			if kind == 0 {
				continue
			}
			_, err := l.Spend(t.Context(), ledger.Presentation{Kind: kind, Digest: digest.Of(s.Value), Source: vm.Address},
				func(*ledger.Tx, ledger.Reservation) error { return nil })
			if why := event.ReasonOf(err); why != event.TokenSpent && why != event.TokenExpired {
				t.Errorf("%s is accepted again: %v", s.Name, err)
			}
		}
	}
}

// failed has two VMs fail, one in booting, when T1 was presented, by its boot server's end;
// one in connecting, when T3 was, by its own: and hunts for what was theirs. Both ends, and
// at last every daemon's, come by signals whose default is a core file.
func (h *hunter) failed(t *testing.T, planted planted) {
	if n := len(h.volumeKeys(t)); n != 0 {
		t.Fatalf("the vault holds %d volumes' keys before", n)
	}
	c := h.s.client(t)
	ctx, cancel := context.WithTimeout(t.Context(), faultLimit)
	defer cancel()
	cores := h.coresBefore(t)
	var early, late api.VM
	var all []secretsOf
	collected := h.collect(t, func() {
		h.s.must(t, "vm", "create", "early", "--restart", "never")
		h.s.happens(ctx, t, c, "early", "token.spent")
		h.s.signalMatching(t, "SEGV", victims["bootserver"])
		early = h.ends(ctx, t, c, "early", event.BootServerFailed)

		h.s.must(t, "vm", "create", "late", "--restart", "never")
		h.s.happens(ctx, t, c, "late", "tunnel.admitted")
		h.s.signalMatching(t, "STOP", victims["QEMU"])
		running, err := c.VM(ctx, "late")
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, secretsOf{what: "tunnel's pre-shared key", secrets: h.presharedKeys(t, 1)},
			secretsOf{what: "VM's key", secrets: h.vmKey(t, running)},
			secretsOf{what: "login key", secrets: h.loginKey(t, running), may: []string{orchestratorToo}})
		h.s.signalMatching(t, "ABRT", victims["gateway"])
		h.s.signalMatching(t, "SEGV", victims["QEMU"])
		h.s.signalMatching(t, "CONT", victims["QEMU"])
		late = h.ends(ctx, t, c, "late", event.VMStopped)
	})
	all = append(all, h.collected(t, collected, 1)...)
	if n := slices.IndexFunc(all, func(one secretsOf) bool { return one.what == "T1" }); len(all[n].secrets) != 2 {
		t.Errorf("%d T1 were collected, want 2", len(all[n].secrets))
	}
	volumes := h.volumeKeys(t)
	if len(volumes) != 2 {
		t.Errorf("the vault holds %d volumes' keys, want 2", len(volumes))
	}
	all = append(all, secretsOf{what: "volumes' keys", secrets: volumes})
	h.void(t, early, all)
	h.void(t, late, all)
	h.told(t, all, "early", early.ID)
	h.told(t, all, "late", late.ID)

	// New processes have nothing but what they find in files: so nothing may be anywhere.
	former := map[string]int{}
	running := h.daemons(t)
	for daemon, signal := range map[string]string{"orchestrator": "ABRT", "host": "SEGV", "gateway": "SEGV", "bootserver": "ABRT"} {
		former[daemon] = running[daemon]
		h.s.signalMatching(t, signal, victims[daemon])
	}
	h.serving(ctx, t, former)
	for i := range all {
		all[i].may = nil
		if all[i].what == "login key" {
			all[i].may = []string{orchestratorToo}
		}
	}
	h.judge(t, all, h.searchTenant(t, all, planted), h.daemons(t))
	cores.judge(t)

	for _, name := range []string{"early", "late"} {
		h.s.must(t, "vm", "delete", name, "--yes")
	}
	if n := len(h.volumeKeys(t)); n != 0 {
		t.Errorf("the vault still holds %d volumes' keys", n)
	}
	h.s.must(t, "fsck")
}

// volumeKeys are those in the vault.
func (h *hunter) volumeKeys(t *testing.T) (list []hunt.Secret) {
	t.Helper()
	v := h.openVault(t)
	names, err := v.Names()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if !strings.HasPrefix(name, "volume") {
			continue
		}
		key, err := v.Get(name)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, hunt.Secret{Name: "volumes' keys", Value: key.Reveal()})
	}
	return list
}

// happens waits for a journal entry of the VM.
func (s *system) happens(ctx context.Context, t *testing.T, c *client.Client, name, kind string) {
	t.Helper()
	done := errors.New("it happened")
	err := c.Events(ctx, client.EventQuery{VM: name, Follow: true}, func(e api.JournalEntry) error {
		switch {
		case e.Event.Kind == kind && e.Event.Reason == "":
			return done
		case e.Event.Kind == "vm.aborted" || e.Event.Kind == "vm.computing":
			return errors.New("it is past it")
		}
		return nil
	})
	if !errors.Is(err, done) {
		t.Fatalf("%s of %s: %v\n%s", kind, name, err, s.run(t.Context(), "vm", "explain", name).stdout)
	}
}

// ends waits for the VM's end.
func (h *hunter) ends(ctx context.Context, t *testing.T, c *client.Client, name string, why event.Reason) api.VM {
	t.Helper()
	vm, err := c.Wait(ctx, name, nil)
	var ended *client.Ended
	if !errors.As(err, &ended) || vm.Phase != client.PhaseAborted || vm.Reason != why {
		t.Fatalf("%s is %s: %s (%s): %v", name, vm.Phase, vm.Reason, vm.Explanation, err)
	}
	return vm
}

// serving waits until new processes of these daemons serve, and everything fits.
func (h *hunter) serving(ctx context.Context, t *testing.T, former map[string]int) {
	t.Helper()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		var st control.Status
		r := h.s.run(ctx, "lab", "status", "--json", "--state", h.s.state)
		if err := json.Unmarshal([]byte(r.stdout), &st); err != nil {
			t.Fatalf("%v: %s", err, r.stderr)
		}
		waits := func(d control.Daemon) bool { return d.State != control.Serving || former[d.Name] == d.PID }
		if !slices.ContainsFunc(st.Daemons, waits) && h.s.run(ctx, "fsck").code == 0 {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("not everything serves: %+v\n%s", st.Daemons, h.s.run(t.Context(), "fsck").stdout)
		}
	}
}

// cores looks for core files.
type cores struct {
	folders []string
	before  []string
	log     string // of the host's agent, which says how a VM's process ended
	said    int    // bytes that it had said before
}

// coresBefore lists those that are there already, once it has shown that it sees one.
func (h *hunter) coresBefore(t *testing.T) *cores {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command("sh", "-c", "ulimit -c unlimited && kill -SEGV $$")
	cmd.Dir = dir
	err := cmd.Run()
	status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if err == nil || !ok {
		t.Fatalf("a process that was sent SIGSEGV ended with %v", err)
	}
	pattern, err := os.ReadFile("/proc/sys/kernel/core_pattern")
	if err != nil {
		t.Fatal(err)
	}
	switch beside := !bytes.HasPrefix(pattern, []byte("|")) && !bytes.HasPrefix(pattern, []byte("/")); {
	case !status.CoreDump():
		t.Log("this machine lets nobody leave a core file")
	case beside && len(coreFiles(t, dir)) != 1:
		t.Errorf("the core file of a process that leaves one is not found: the search shows nothing")
	}
	// Daemons work in /, this test here.
	c := &cores{folders: []string{h.s.state, "/", "."}, log: filepath.Join(h.s.state, "logs", "host.log")}
	if pattern[0] == '/' {
		c.folders = append(c.folders, filepath.Dir(string(pattern)))
	}
	c.before = coreFiles(t, c.folders...)
	c.said = len(c.read(t))
	return c
}

func (c *cores) read(t *testing.T) []byte {
	t.Helper()
	data, err := os.ReadFile(c.log)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// judge looks for new ones, and asks the kernel, which says so to whoever waits for a
// process. Go's own processes say what each goroutine did and end by themselves.
func (c *cores) judge(t *testing.T) {
	t.Helper()
	for _, file := range coreFiles(t, c.folders...) {
		if !slices.Contains(c.before, file) {
			t.Errorf("a core file was left: %s", file)
		}
	}
	said := c.read(t)[c.said:]
	if !bytes.Contains(said, []byte("signal: segmentation fault")) || bytes.Contains(said, []byte("core dumped")) {
		t.Errorf("QEMU did not end by SIGSEGV, or left a core file:\n%s", said)
	}
	for _, daemon := range []string{"orchestrator", "bootserver", "gateway", "host"} {
		data, err := os.ReadFile(filepath.Join(filepath.Dir(c.log), daemon+".log"))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(data, []byte("\ngoroutine ")) {
			t.Errorf("the log of %s does not say what its goroutines did: the search of that shows nothing", daemon)
		}
	}
}

// coreFiles lists core files (ELF, ET_CORE) below the folders; of / and the folder that the
// test is in, which hold much else, those directly in it.
func coreFiles(t *testing.T, folders ...string) (list []string) {
	t.Helper()
	for _, dir := range folders {
		err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
			switch {
			case errors.Is(err, os.ErrNotExist):
				return nil
			case err != nil:
				return err
			case e.IsDir() && path != dir && (dir == "/" || dir == "."):
				return filepath.SkipDir
			case e.Type().IsRegular() && isCore(path):
				list = append(list, path)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return list
}

func isCore(path string) bool {
	f, err := elf.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	return f.Type == elf.ET_CORE
}
