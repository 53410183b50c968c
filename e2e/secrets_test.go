//go:build system

package e2e

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/e2e/hunt"
	"foothold/lab"
	"foothold/lab/control"
	"foothold/protocol/api"
	"foothold/tenant/ledger"
	"foothold/tenant/orchestrator"
	"foothold/tenant/vault"
)

// This file looks for every secret of a run where it must not be.
//
// Where a secret may lie follows from "Where secrets are" in ARCHITECTURE.md: at the
// tenant's everything, in the DMZ no VM's private key and no disk key, at the provider
// nothing but T1. What may be in a process may still be in no file, log, argument list or
// environment, and nothing may cross a network in the clear.
//
// How the secrets become known, without a word of it in the product:
//
//	vault's keys, off-line keys, daemons' TLS keys   from their files, at the tenant's and in place
//	login key                                        derived from the vault's root
//	T1                                               from the sealed file that QEMU was handed
//	T2, T3, passphrases, password, headers           from the orchestrator's memory, while they are there
//	VM's key                                         from the guest's memory, by its public half
//
// Not collected: the VM's WireGuard key and the tunnel's session keys, which nothing outside
// the guest knows a form of; TLS traffic secrets, which never leave Go's TLS stack; keys inside
// the software TPM, which stands for a chip. Tokens are found by their form besides,
// collected or not.

// secretsOf are secrets that share where they may lie.
type secretsOf struct {
	what    string
	secrets []hunt.Secret
	may     []string // see where
}

// orchestratorToo is where the orchestrator's secrets may lie besides.
const orchestratorToo = "memory orchestrator"

// guestMemory is that of a VM of the default size, in bytes.
const guestMemory = 1 << 30

// captures are the interfaces that together see every edge of the lab.
var captures = map[string][]string{
	lab.Host:     {"uplink0", "mgmt0"},
	lab.Internal: {"tenant0", "dmz0"},
	lab.Gateway:  {"dmz0", "wg0"},
	lab.Store:    {"dmz0"},
}

// TestSecretsStayWhereTheyBelong takes a VM through the whole story and hunts; and again
// after a second start, after its end, and after starts that failed.
func TestSecretsStayWhereTheyBelong(t *testing.T) {
	s := newSystem(t)
	s.template(t)
	h := newHunter(t, s)
	var vm api.VM
	var control planted
	run := func() {
		control = h.plant(t)
		created := s.must(t, "vm", "create", "web", "--workload", filepath.Join(s.bin, "sample-web"), "--wait", "--json")
		if err := json.Unmarshal([]byte(created), &vm); err != nil {
			t.Fatal(err)
		}
		if r := s.fetch(t, lab.Tenant, vm.WorkloadURL); r.code != 0 {
			t.Fatalf("the workload does not answer: %s", r.stderr)
		}
	}
	collected := h.collect(t, func() { h.capture(t, run) })
	daemons := h.daemons(t)
	first := h.ofStart(t, vm, collected)
	all := slices.Concat(first, h.standing(t), control.hunted())
	finds := h.search(t, all, guestMemory, h.traffic)
	t.Run("what is planted is found", func(t *testing.T) { control.judge(t, finds, "/host/mgmt0 udp") })
	t.Run("what belongs somewhere is found there", func(t *testing.T) { h.natural(t, finds, daemons) })
	t.Run("nothing is where it must not be", func(t *testing.T) { h.judge(t, all, finds, daemons) })
	t.Run("QEMU's memory is closed", func(t *testing.T) { h.closed(t, finds) })
	t.Run("the journal holds none", func(t *testing.T) { h.told(t, all, "web", vm.ID) })
	var second []secretsOf
	t.Run("nothing remains of the start before", func(t *testing.T) { second = h.restarted(t, vm, first, collected, control) })
	t.Run("nothing remains of a deleted VM", func(t *testing.T) { h.deleted(t, append(all, second...), control) })
	t.Run("nothing remains of starts that failed", func(t *testing.T) { h.failed(t, control) })
}

// collect gathers the secrets that come to be while what runs, and did not before.
func (h *hunter) collect(t *testing.T, what func()) []hunt.Secret {
	t.Helper()
	collector := h.start(t, lab.Host, "collect", map[string]any{"pids": []int{h.daemons(t)["orchestrator"]}, "vms": true})
	what()
	fresh := slices.DeleteFunc(secretLines(t, collector.end(t)), func(s hunt.Secret) bool { // the orchestrator's memory may still have former ones
		return slices.ContainsFunc(h.known, func(old hunt.Secret) bool { return same(s, old) })
	})
	h.known = append(h.known, fresh...)
	return fresh
}

// capture records every network while what runs.
func (h *hunter) capture(t *testing.T, what func()) {
	t.Helper()
	recorders := map[string]*inside{}
	for place, interfaces := range captures {
		dir := filepath.Join(h.traffic, place)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		recorders[place] = h.start(t, place, "capture", map[string]any{"interfaces": interfaces, "folder": dir})
		recorders[place].line(t)
	}
	what()
	for place, r := range recorders {
		var got struct{ Packets, Lost int }
		if err := json.Unmarshal(lastLine(r.end(t)), &got); err != nil || got.Packets == 0 || got.Lost > 0 {
			t.Errorf("capture in %s: %+v, %v: what was lost is not searched", place, got, err)
		}
		t.Logf("captured in %s: %d packets", place, got.Packets)
	}
}

// deleted deletes the VM and looks again for what was its own: in no file at all now, the
// tenant's included; in memory where it passed through, the volume's key nowhere but with
// the orchestrator, which held it last.
func (h *hunter) deleted(t *testing.T, all []secretsOf, control planted) {
	h.s.must(t, "vm", "delete", "web", "--yes")
	var own []secretsOf
	for _, one := range all {
		switch one.what {
		case "T1", "T2", "T3", "password", "passphrases", "headers", "login key", "tunnel's pre-shared key", "VM's key":
			one.may = over(one.may)
			own = append(own, one)
		case "vault":
			one.secrets = slices.DeleteFunc(slices.Clone(one.secrets), func(s hunt.Secret) bool {
				return !strings.HasPrefix(s.Name, "vault's volume")
			})
			if len(one.secrets) != 1 {
				t.Errorf("%d volume keys are looked for, want 1", len(one.secrets))
			}
			own = append(own, one)
		}
	}
	finds := h.searchTenant(t, own, control)
	h.judge(t, own, finds, h.daemons(t))
	if n := len(h.volumeKeys(t)); n != 0 {
		t.Errorf("the vault still holds %d volumes' keys", n)
	}
}

// over is where a secret may still lie when its start is over: in the memory of those that it
// passed through.
func over(may []string) []string {
	return slices.DeleteFunc(slices.Clone(may), func(where string) bool {
		return strings.HasPrefix(where, "file ") || where == "memory VM"
	})
}

// searchTenant searches the orchestrator's files too, where the control must be found.
func (h *hunter) searchTenant(t *testing.T, all []secretsOf, control planted) []hunt.Find {
	t.Helper()
	tenant := filepath.Join(h.s.state, "tenant", "orchestrator")
	file := filepath.Join(tenant, "control")
	if err := os.WriteFile(file, control.secret, 0o600); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(file)
	finds := h.search(t, append(slices.Clip(all), control.hunted()...), guestMemory, tenant)
	control.judge(t, finds, file)
	return finds
}

func (h *hunter) openVault(t *testing.T) *vault.Vault {
	t.Helper()
	v, _, err := orchestrator.Open(filepath.Join(h.s.state, "tenant", "orchestrator"))
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// hunter runs e2e/hunt/hunter inside the lab.
type hunter struct {
	s       *system
	program string
	traffic string        // folder of what was captured
	known   []hunt.Secret // that were collected so far
}

func newHunter(t *testing.T, s *system) *hunter {
	t.Helper()
	h := &hunter{s: s, program: filepath.Join(t.TempDir(), "hunter"), traffic: filepath.Join(t.TempDir(), "traffic")}
	cmd := exec.Command("go", "build", "-o", h.program, "foothold/e2e/hunt/hunter")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the hunter: %v\n%s", err, out)
	}
	return h
}

// inside is a hunter that runs in a place of the lab.
type inside struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    io.ReadCloser
	begun  []byte
	stderr bytes.Buffer
}

func (h *hunter) start(t *testing.T, place, verb string, what any, args ...string) *inside {
	t.Helper()
	i := &inside{cmd: h.s.command(context.Background(), append([]string{"lab", "exec", "--state", h.s.state, place, "--", h.program, verb}, args...)...)}
	i.cmd.Stderr = &i.stderr
	var err error
	if i.in, err = i.cmd.StdinPipe(); err == nil {
		i.out, err = i.cmd.StdoutPipe()
	}
	if err == nil {
		err = i.cmd.Start()
	}
	if err == nil {
		err = json.NewEncoder(i.in).Encode(what)
	}
	if err != nil {
		t.Fatalf("hunter %s in %s: %v", verb, place, err)
	}
	t.Cleanup(func() { i.in.Close() })
	return i
}

// line waits for the first line, by which the hunter says that it has begun.
func (i *inside) line(t *testing.T) {
	t.Helper()
	for b := make([]byte, 1); !bytes.HasSuffix(i.begun, []byte("\n")); {
		if _, err := i.out.Read(b); err != nil {
			t.Fatalf("hunter: %v: %s", err, &i.stderr)
		}
		i.begun = append(i.begun, b...)
	}
}

// end ends the hunter's input and returns the rest of what it says.
func (i *inside) end(t *testing.T) []byte {
	t.Helper()
	i.in.Close()
	out, err := io.ReadAll(i.out)
	if werr := i.cmd.Wait(); err != nil || werr != nil {
		t.Fatalf("hunter: %v %v: %s", err, werr, &i.stderr)
	}
	return out
}

func secretLines(t *testing.T, out []byte) (list []hunt.Secret) {
	t.Helper()
	for dec := json.NewDecoder(bytes.NewReader(out)); dec.More(); {
		var s hunt.Secret
		if err := dec.Decode(&s); err != nil {
			t.Fatal(err)
		}
		list = append(list, s)
	}
	return list
}

func lastLine(out []byte) []byte {
	lines := bytes.Split(bytes.TrimSpace(out), []byte("\n"))
	return lines[len(lines)-1]
}

// daemons are the daemons' process numbers, as the lab's places see them.
func (h *hunter) daemons(t *testing.T) map[string]int {
	t.Helper()
	var st control.Status
	if err := json.Unmarshal([]byte(h.s.must(t, "lab", "status", "--json", "--state", h.s.state)), &st); err != nil {
		t.Fatal(err)
	}
	pids := map[string]int{}
	for _, d := range st.Daemons {
		pids[d.Name] = d.PID
	}
	return pids
}

// ofStart gathers the secrets of one start of a VM, which runs.
func (h *hunter) ofStart(t *testing.T, vm api.VM, collected []hunt.Secret) []secretsOf {
	t.Helper()
	return append(h.collected(t, collected, 1),
		secretsOf{"tunnel's pre-shared key", h.presharedKeys(t, 1), []string{"file dmz/gateway/state/peers.json", "memory gateway"}},
		secretsOf{"VM's key", h.vmKey(t, vm), nil},
		secretsOf{"login key", h.loginKey(t, vm), []string{orchestratorToo}})
}

// collected sorts what the hunter collected of so many starts.
func (h *hunter) collected(t *testing.T, collected []hunt.Secret, starts int) []secretsOf {
	t.Helper()
	named := func(name string, want int) (list []hunt.Secret) {
		for _, s := range collected {
			if s.Name == name {
				list = append(list, s)
			}
		}
		if len(list) < want {
			t.Errorf("%d of %s were collected, want %d: the hunt lacks them", len(list), name, want)
		}
		return list
	}
	var pieces []hunt.Secret
	whole := opened(t, collected, collected)
	if len(whole) != 2*starts {
		t.Errorf("%d whole headers were collected, want %d", len(whole), 2*starts)
	}
	for _, header := range whole {
		pieces = append(pieces, headerPieces(header.Value)...)
	}
	return []secretsOf{
		{"T1", named("T1", starts), []string{"memory host", "memory VM", "memory bootserver", orchestratorToo}},
		{"T2", named("T2", starts), []string{"memory bootserver", orchestratorToo}},
		{"T3", named("T3", starts), []string{"memory gateway", orchestratorToo}},
		{"password", named("password", starts), []string{"memory gateway", orchestratorToo}},
		{"passphrases", named("passphrase", 2*starts), []string{orchestratorToo}}, // template's and volume's
		{"headers", pieces, []string{orchestratorToo}},
	}
}

// standing gathers the secrets that are no start's own.
func (h *hunter) standing(t *testing.T) []secretsOf {
	t.Helper()
	return append(h.keyFiles(t), secretsOf{"vault", h.vault(t), []string{orchestratorToo}})
}

// vault opens the tenant's vault.
func (h *hunter) vault(t *testing.T) []hunt.Secret {
	t.Helper()
	kek, err := os.ReadFile(filepath.Join(h.s.state, "tenant", "orchestrator", "vault.key"))
	if err != nil {
		t.Fatal(err)
	}
	list := []hunt.Secret{{Name: "key-encryption key", Value: kek}}
	v := h.openVault(t)
	names, err := v.Names()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		value, err := v.Get(name)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, hunt.StoredKey("vault's "+name, value.Reveal()))
	}
	for _, kind := range []string{"volume", "template", "authority", "signing", "login"} {
		if !slices.ContainsFunc(names, func(n string) bool { return strings.HasPrefix(n, kind) }) {
			t.Errorf("the vault holds no %s key: %q", kind, names)
		}
	}
	return list
}

// loginKey is the one that may log in at this start.
func (h *hunter) loginKey(t *testing.T, vm api.VM) []hunt.Secret {
	t.Helper()
	root, err := h.openVault(t).Get("login-root")
	if err != nil {
		t.Fatal(err)
	}
	var epoch int64
	h.ledger(t, func(tx *ledger.Tx) (err error) {
		epoch, err = tx.Epoch()
		return err
	})
	key, err := orchestrator.LoginKey(root, epoch, vm.ID, vm.Start)
	if err != nil {
		t.Fatal(err)
	}
	return []hunt.Secret{{Name: "login key", Value: key.Seed()}}
}

// ledger reads a copy of the orchestrator's.
func (h *hunter) ledger(t *testing.T, read func(*ledger.Tx) error) {
	t.Helper()
	l := h.copyLedger(t)
	defer l.Close()
	if err := l.Read(t.Context(), read); err != nil {
		t.Fatal(err)
	}
}

func (h *hunter) copyLedger(t *testing.T) *ledger.Ledger {
	t.Helper()
	dir := t.TempDir()
	for _, suffix := range []string{"", "-wal"} {
		data, err := os.ReadFile(filepath.Join(h.s.state, "tenant", "orchestrator", "ledger.db"+suffix))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "ledger.db"+suffix), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	l, err := ledger.Open(t.Context(), filepath.Join(dir, "ledger.db"), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// presharedKeys are those of the gateway's peers, which it keeps for its next start.
func (h *hunter) presharedKeys(t *testing.T, want int) (list []hunt.Secret) {
	t.Helper()
	var kept struct {
		Peers []struct {
			PSK []byte `json:"psk"`
		} `json:"peers"`
	}
	if err := json.Unmarshal([]byte(h.s.peers(t)), &kept); err != nil || len(kept.Peers) != want {
		t.Fatalf("%d peers, want %d, %v", len(kept.Peers), want, err)
	}
	for _, p := range kept.Peers {
		list = append(list, hunt.Secret{Name: "tunnel's pre-shared key", Value: p.PSK})
	}
	return list
}

// keyFiles are the private keys in files: each daemon's may lie in its own folder and in
// its own memory, off-line keys in their place alone.
func (h *hunter) keyFiles(t *testing.T) (all []secretsOf) {
	t.Helper()
	err := filepath.WalkDir(h.s.state, func(path string, e fs.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".key" || e.Name() == "vault.key" {
			return err
		}
		rel, err := filepath.Rel(h.s.state, path)
		if err != nil {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		one := secretsOf{what: rel, may: []string{"file " + rel}}
		secret := hunt.Secret{Name: rel, Value: data}
		if bytes.Contains(data, []byte("PRIVATE KEY")) {
			if secret, err = hunt.PrivateKey(rel, data); err != nil {
				return err
			}
		}
		one.secrets = []hunt.Secret{secret}
		parts := strings.Split(rel, string(filepath.Separator))
		switch {
		case parts[0] == "dmz":
			one.may = append(one.may, "memory "+parts[1])
		case parts[0] == "provider" && parts[1] == "tls":
			one.may = append(one.may, "memory host")
		case parts[0] == "tenant":
			one.may = append(one.may, orchestratorToo)
		}
		all = append(all, one)
		return nil
	})
	if err != nil || len(all) < 10 {
		t.Fatalf("%d key files, %v", len(all), err)
	}
	return all
}

// vmKey finds the VM's private key in the guest's memory. The ledger knows its public half.
func (h *hunter) vmKey(t *testing.T, vm api.VM) []hunt.Secret {
	t.Helper()
	var public []byte
	h.ledger(t, func(tx *ledger.Tx) error {
		start, err := tx.Start(vm.ID, vm.Start)
		public = start.VMKey
		return err
	})
	if len(public) != ed25519.PublicKeySize {
		t.Fatalf("the VM's public key has %d bytes", len(public))
	}
	found := secretLines(t, h.start(t, lab.Host, "collect", map[string]any{"guests": true, "public": [][]byte{public}}).end(t))
	for _, s := range found {
		if s.Name == "VM key" {
			return []hunt.Secret{{Name: "VM's key", Value: s.Value}}
		}
	}
	t.Error("the VM's private key is not in the guest's memory in the form that is known: the hunt lacks it")
	return nil
}

// where names a place for the tables: "file provider/x", "memory gateway", "arguments ...".
func (h *hunter) where(f hunt.Find, daemons map[string]int) string {
	if f.Kind == hunt.File {
		rel, err := filepath.Rel(h.s.state, f.Name)
		if err == nil && !strings.HasPrefix(rel, "..") {
			return "file " + rel
		}
		return "traffic " + f.Name
	}
	name := f.Name
	for daemon, pid := range daemons {
		if pid == f.PID {
			name = daemon
		}
	}
	if strings.HasPrefix(f.Name, "qemu-system-") {
		name = "VM"
	}
	return f.Kind + " " + name
}

// search looks everywhere for everything, and in the named folders. Memory regions of a VM's
// process from a size on are the guest's and left out; 0 leaves out nothing.
func (h *hunter) search(t *testing.T, all []secretsOf, guest int64, in ...string) (finds []hunt.Find) {
	t.Helper()
	var secrets []hunt.Secret
	for _, one := range all {
		secrets = append(secrets, one.secrets...)
	}
	var folders []string
	for _, name := range []string{"provider", "dmz", "logs", "run"} {
		folders = append(folders, filepath.Join(h.s.state, name))
	}
	began := time.Now()
	out := h.start(t, lab.Host, "search", map[string]any{"secrets": secrets, "folders": append(folders, in...), "guest": guest}).end(t)
	for dec := json.NewDecoder(bytes.NewReader(out)); dec.More(); {
		var f hunt.Find
		if err := dec.Decode(&f); err != nil {
			t.Fatal(err)
		}
		finds = append(finds, f)
	}
	t.Logf("%d secrets, %d finds after %.1f s", len(secrets), len(finds), time.Since(began).Seconds())
	return finds
}

// judge reports every find that the table does not allow.
func (h *hunter) judge(t *testing.T, all []secretsOf, finds []hunt.Find, daemons map[string]int) {
	may := map[string][]string{}
	for _, one := range all {
		may[one.what] = append(may[one.what], one.may...) // tokens are found by their form, under this name
		for _, s := range one.secrets {
			if s.Name != one.what {
				may[s.Name] = append(may[s.Name], one.may...)
			}
		}
	}
	for _, f := range finds {
		where := h.where(f, daemons)
		if f.Kind == hunt.File && f.Secret != "control" && !h.private(t, f.Name) {
			t.Errorf("%s lies in %s, which others may read", f.Secret, where)
		}
		if f.Secret == "control" || slices.Contains(may[f.Secret], where) {
			continue
		}
		t.Errorf("%s lies in %s: %s at %d, %d times", f.Secret, where, f.Form, f.Offset, f.Times)
	}
}

// private reports whether only its owner may read a file.
func (h *hunter) private(t *testing.T, file string) bool {
	t.Helper()
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	return info.Mode().Perm()&0o077 == 0
}

// natural checks that the hunt finds what it must: each daemon's key in its memory and
// file, T1 in QEMU's memory.
func (h *hunter) natural(t *testing.T, finds []hunt.Find, daemons map[string]int) {
	var seen []string
	for _, f := range finds {
		seen = append(seen, f.Secret+" in "+h.where(f, daemons))
	}
	for _, want := range []string{
		"dmz/bootserver/boot.key in file dmz/bootserver/boot.key", "provider/tls/host.key in file provider/tls/host.key",
		"dmz/bootserver/boot.key in memory bootserver", "dmz/gateway/gateway.key in memory gateway", "provider/tls/host.key in memory host",
		"T1 in memory VM",
	} {
		if !slices.Contains(seen, want) {
			t.Errorf("not found: %s", want)
		}
	}
}

// closed looks at QEMU as another process of its user does.
func (h *hunter) closed(t *testing.T, finds []hunt.Find) {
	pid := 0
	for _, f := range finds {
		if strings.HasPrefix(f.Name, "qemu-system-") {
			pid = f.PID
		}
	}
	if pid == 0 {
		t.Fatal("no QEMU process is known")
	}
	file := fmt.Sprintf("/proc/%d/environ", pid)
	if r := h.s.run(t.Context(), "lab", "exec", "--state", h.s.state, lab.Host, "--", "head", "-c0", file); r.code != 0 {
		t.Errorf("root of the lab does not open it either, so this shows nothing: %s", r.stderr)
	}
	if r := h.s.run(t.Context(), "lab", "exec", "--state", h.s.state, lab.Host, "--", "setpriv", "--bounding-set=-all", "--inh-caps=-all", "head", "-c0", file); r.code == 0 {
		t.Error("another process of its user opens it")
	}
	limits := h.s.must(t, "lab", "exec", "--state", h.s.state, lab.Host, "--", "grep", "core file", fmt.Sprintf("/proc/%d/limits", pid))
	if !strings.Contains(strings.Join(strings.Fields(limits), " "), "size 0 0") {
		t.Errorf("QEMU may leave a core file: %s", limits)
	}
	status := h.s.must(t, "lab", "exec", "--state", h.s.state, lab.Host, "--", "cat", fmt.Sprintf("/proc/%d/status", pid))
	for _, set := range []string{"CapPrm", "CapEff", "CapAmb", "CapInh"} {
		if !strings.Contains(status, set+":\t0000000000000000\n") {
			t.Errorf("%s of QEMU is not empty:\n%s", set, status)
		}
	}
}

// told searches all that people are told of a VM, where its id must be found.
func (h *hunter) told(t *testing.T, all []secretsOf, name, id string) {
	t.Helper()
	secrets := []hunt.Secret{{Name: "the VM's id", Value: []byte(id)}}
	for _, one := range all {
		secrets = append(secrets, one.secrets...)
	}
	m, err := hunt.NewMatcher(secrets)
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"events", "--json"}, {"vm", "explain", id, "--json"}, {"vm", "explain", id}, {"vm", "show", id, "--json"}, {"vm", "logs", id, "--raw"}} {
		found := map[string]int{}
		m.Bytes([]byte(h.s.must(t, args...)), 0, func(hit hunt.Hit) { found[hit.Secret]++ })
		if args[0] == "events" && found["the VM's id"] == 0 {
			t.Error("the VM's id is not found: the search shows nothing")
		}
		delete(found, "the VM's id")
		for secret, n := range found {
			t.Errorf("foothold %s of %s tells %s, %d times", strings.Join(args[:2], " "), name, secret, n)
		}
	}
}

// planted is a secret of the test's own in each kind of place.
type planted struct{ secret []byte }

// plant puts it into files of each folder, a log, a process's arguments, environment and
// memory, and a datagram.
func (h *hunter) plant(t *testing.T) planted {
	t.Helper()
	p := planted{make([]byte, 32)}
	rand.Read(p.secret)
	text := hex.EncodeToString(p.secret)
	for name, content := range map[string]string{
		"provider/state/control": string(p.secret), "dmz/gateway/state/control": "x" + text, "logs/control.log": base64.StdEncoding.EncodeToString(append([]byte("xy"), p.secret...)),
	} {
		file := filepath.Join(h.s.state, name)
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Remove(file) })
	}
	t.Setenv("FOOTHOLD_TEST_CONTROL", base64.URLEncoding.EncodeToString(append([]byte("x"), p.secret...)))
	i := h.start(t, lab.Host, "plant", map[string]any{"secret": p.secret, "to": lab.Address(lab.Tenant, lab.TenantLAN).String() + ":9"}, strings.ToUpper(text))
	i.line(t)
	if err := os.Unsetenv("FOOTHOLD_TEST_CONTROL"); err != nil {
		t.Fatal(err)
	}
	return p
}

// hunted is the row of the table.
func (p planted) hunted() []secretsOf {
	return []secretsOf{{what: "control", secrets: []hunt.Secret{{Name: "control", Value: p.secret}}}}
}

// judge checks that each was found, and those in further files.
func (p planted) judge(t *testing.T, finds []hunt.Find, files ...string) {
	t.Helper()
	for _, file := range files {
		if !slices.ContainsFunc(finds, func(f hunt.Find) bool {
			return f.Secret == "control" && f.Kind == hunt.File && strings.Contains(f.Name, file)
		}) {
			t.Errorf("the planted secret is not found in %s: the search shows nothing", file)
		}
	}
	for _, want := range []struct{ kind, in string }{
		{hunt.File, "provider/state/control"}, {hunt.File, "dmz/gateway/state/control"}, {hunt.File, "logs/control.log"},
		{hunt.Arguments, "hunter"}, {hunt.Environment, "hunter"}, {hunt.Memory, "hunter"},
	} {
		if !slices.ContainsFunc(finds, func(f hunt.Find) bool {
			return f.Secret == "control" && f.Kind == want.kind && strings.Contains(f.Name, want.in)
		}) {
			t.Errorf("the planted secret is not found: %s, %s", want.kind, want.in)
		}
	}
}
