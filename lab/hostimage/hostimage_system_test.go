//go:build system

package hostimage_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/internal/bootimage"
	"foothold/internal/tpm"
	"foothold/internal/tpm/swtpm"
	"foothold/lab/hostimage"
	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/hostapi"
	"foothold/protocol/imalog"
	"foothold/protocol/inventory"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/systemdlog"
	"foothold/protocol/tcglog"
	"foothold/tenant/reference"

	"github.com/google/go-tpm/tpm2"
)

// logsDir keeps the logs of the last run, for tests and fuzzers of what reads logs.
const logsDir = "../../build/hostimage/logs"

// bootTimeout bounds one boot; it takes 17 s on an idle core.
const bootTimeout = 150 * time.Second

func cacheDir(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv("FOOTHOLD_CACHE"); dir != "" {
		return dir
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "foothold")
}

// program builds a static program of the module.
func program(t *testing.T, pkg string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "program")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", pkg, err, text)
	}
	return out
}

// boot is what one machine showed, read and replayed.
type boot struct {
	image    hostimage.Image
	firmware []byte
	events   []tcglog.Event
	files    []imalog.Entry
	regs     map[int]digest.SHA256
	entry    inventory.Host
	answer   hostapi.QuoteResponse // of the agent, by its API
	alone    hostapi.QuoteResponse // of the command, before the agent ran
}

// bench boots variants of one host, all on the same TPM.
type bench struct {
	kernel  *bootimage.Kernel
	options hostimage.Options
	tpm     string
}

func newBench(t *testing.T) *bench {
	t.Helper()
	kernel, err := bootimage.FetchKernel(t.Context(), cacheDir(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{kernel: kernel, tpm: filepath.Join(t.TempDir(), "tpm"), options: hostimage.Options{
		CacheDir: cacheDir(t), Init: program(t, "foothold/lab/hostimage/init"), Agent: program(t, "foothold/cmd/foothold-host"),
		Modules: []string{"drivers/net/tun.ko"}, Progress: func(s string) { t.Log(s) }}}
	if err := swtpm.Manufacture(t.Context(), b.tpm); err != nil {
		t.Fatal(err)
	}
	return b
}

// run builds the host, boots it, keeps its logs under name, and proves that they are
// what its TPM quoted and name what it ran.
func (b *bench) run(t *testing.T, name string, o hostimage.Options) boot {
	t.Helper()
	o.Dir = t.TempDir()
	image, err := hostimage.Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
	defer cancel()
	nonce := binding(question(name))
	run, err := hostimage.Boot(ctx, image, b.tpm, nonce)
	if err != nil {
		t.Fatalf("%v\n%s", err, run.Console)
	}
	var answer, alone hostapi.QuoteResponse
	var entry inventory.Host
	if err := errors.Join(json.Unmarshal(run.Answer.Served, &answer), json.Unmarshal(run.Answer.Quote, &alone), json.Unmarshal(run.Answer.Entry, &entry)); err != nil {
		t.Fatal(err)
	}
	if entry.EKChain, err = swtpm.Chain(b.tpm); err != nil { // as who publishes adds it
		t.Fatal(err)
	}
	b.keep(t, name, entry, run.Answer.Served, answer.Platform)
	t.Logf("%s: answered after %.1f s; firmware's log has %d bytes, kernel's list %d", name, run.Took.Seconds(), len(answer.Platform.Firmware), len(answer.Platform.Kernel))
	result := replay(t, answer.Platform)
	result.image, result.entry, result.answer, result.alone = image, entry, answer, alone
	result.quoted(t, entry, answer.Quote, nonce)
	result.names(t, "/host/foothold-host", o.Agent)
	for _, m := range o.Modules {
		result.names(t, "/host/modules/"+filepath.Base(m), filepath.Join(b.kernel.Modules(), "kernel", m))
	}
	if len(run.Answer.Modules) != len(o.Modules) {
		t.Errorf("%s: the host loaded %v", name, run.Answer.Modules)
	}
	return result
}

// keep writes what a boot gave, and whom its TPM's certificate is from, where other tests
// find it.
func (b *bench) keep(t *testing.T, name string, host inventory.Host, quote []byte, p evidence.Platform) {
	t.Helper()
	logs, err := json.Marshal(p)
	entry, err2 := json.Marshal(host)
	roots, err3 := os.ReadFile(filepath.Join(b.tpm, swtpm.RootFile))
	dir := filepath.Join(logsDir, name)
	err = errors.Join(err, err2, err3, os.MkdirAll(dir, 0o755))
	for file, data := range map[string][]byte{"firmware": p.Firmware, "kernel": p.Kernel, "platform.json": logs,
		"quote.json": quote, "entry.json": entry, "tpm-roots.pem": roots} {
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, file), data, 0o644))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// replay reads both logs, and replays all but the kernel's register.
func replay(t *testing.T, p evidence.Platform) boot {
	t.Helper()
	firmware, err := tcglog.Parse(p.Firmware)
	if err != nil {
		t.Fatal(err)
	}
	values, err := firmware.Replay(tcglog.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := imalog.Parse(p.Kernel)
	if err != nil {
		t.Fatal(err)
	}
	b := boot{firmware: p.Firmware, events: firmware.Events, files: kernel.Entries, regs: map[int]digest.SHA256{}}
	for i, v := range values {
		b.regs[i] = digest.SHA256(v)
	}
	phases, err := systemdlog.Parse(p.Userspace)
	if err != nil || len(phases) != len(hostimage.Phases) {
		t.Errorf("the system's log has %d records, want one a phase: %v", len(phases), err)
	}
	for _, r := range phases {
		b.regs[r.PCR] = pcr.Extend(b.regs[r.PCR], r.SHA256)
	}
	// The kernel's first entry is over registers 0 to 9 (security/integrity/ima/ima_crypto.c).
	h := sha256.New()
	for i := range 10 {
		v := b.regs[i]
		h.Write(v[:])
	}
	if first := kernel.Entries[0]; first.Path != "boot_aggregate" || !bytes.Equal(first.Digest, h.Sum(nil)) {
		t.Errorf("the kernel's list begins with %s %x, registers 0 to 9 give %x", first.Path, first.Digest, h.Sum(nil))
	}
	return b
}

// quoted holds the logs against the TPM's signed word.
func (b *boot) quoted(t *testing.T, entry inventory.Host, q evidence.Quote, nonce digest.SHA256) {
	t.Helper()
	aik, err := tpm.ParsePublic(entry.AIK)
	if err != nil {
		t.Fatal(err)
	}
	point, err := aik.Unique.ECC()
	if err != nil {
		t.Fatal(err)
	}
	signature, err := tpm2.Unmarshal[tpm2.TPMTSignature](q.Signature)
	if err != nil {
		t.Fatal(err)
	}
	rs, err := signature.Signature.ECDSA()
	if err != nil {
		t.Fatal(err)
	}
	key := &ecdsa.PublicKey{Curve: elliptic.P256(), X: new(big.Int).SetBytes(point.X.Buffer), Y: new(big.Int).SetBytes(point.Y.Buffer)}
	sum := sha256.Sum256(q.Attest)
	if !ecdsa.Verify(key, sum[:], new(big.Int).SetBytes(rs.SignatureR.Buffer), new(big.Int).SetBytes(rs.SignatureS.Buffer)) {
		t.Error("the quote is not signed by the entry's key")
	}
	attest, err := tpm2.Unmarshal[tpm2.TPMSAttest](q.Attest)
	if err != nil {
		t.Fatal(err)
	}
	info, err := attest.Attested.Quote()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(attest.ExtraData.Buffer, nonce[:]) {
		t.Errorf("the quote answers %x", attest.ExtraData.Buffer)
	}
	list := imalog.List{Entries: b.files}
	n, ok := list.Prefix(func(value digest.SHA256) bool {
		b.regs[pcr.Platform] = value
		composite := pcr.Composite(pcr.StaticSelection(), b.regs)
		return bytes.Equal(info.PCRDigest.Buffer, composite[:])
	})
	if !ok {
		t.Error("the logs do not lead to what the TPM quoted")
	}
	t.Logf("the quote proves %d of the kernel's %d entries", n, len(b.files))
}

// names demands that the kernel's list has the file at path with the digest of source.
func (b *boot) names(t *testing.T, path, source string) {
	t.Helper()
	data, err := os.ReadFile(source)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(data)
	if !slices.ContainsFunc(b.files, func(e imalog.Entry) bool {
		return e.Path == path && e.Algorithm == "sha256" && bytes.Equal(e.Digest, sum[:])
	}) {
		t.Errorf("the kernel's list lacks %s with %x", path, sum)
	}
}

// changedEvents says which events of a firmware's log differ from the good one's, by
// register and description; both logs must have the same events in the same places.
func changedEvents(t *testing.T, good, other boot) []string {
	t.Helper()
	if len(good.events) != len(other.events) {
		t.Fatalf("the firmware's log has %d events, the good host's %d", len(other.events), len(good.events))
	}
	var list []string
	for i, e := range other.events {
		if g := good.events[i]; e.PCR != g.PCR || e.Type != g.Type || !bytes.Equal(e.Digest(tcglog.SHA256), g.Digest(tcglog.SHA256)) {
			list = append(list, fmt.Sprintf("%d %s", e.PCR, e.Describe()))
		}
	}
	return list
}

// changedFiles says which files of the kernel's list are not in the good one's.
func changedFiles(good, other boot) []string {
	var list []string
	for _, e := range other.files {
		if !slices.ContainsFunc(good.files, func(g imalog.Entry) bool { return g.Path == e.Path && bytes.Equal(g.Digest, e.Digest) }) {
			list = append(list, e.Path)
		}
	}
	return list
}

// TestHost boots a good host, whose genuine logs lead to an accepting verdict, and three
// others, each of which is refused for what it differs by.
func TestHost(t *testing.T) {
	b := newBench(t)
	good := b.run(t, "good", b.options)
	for _, e := range good.events {
		t.Logf("event %2d, register %2d: %s", e.Number, e.PCR, e.Describe())
	}
	for _, e := range good.files {
		t.Logf("file %2d: %s", e.Number, e.Path)
	}
	const agentReads = 5 // its configuration, QEMU, firmware, loader
	if len(good.files) != 2+len(b.options.Modules)+agentReads {
		t.Errorf("the kernel measured %d files, want the registers, the modules, the agent and what it reads", len(good.files))
	}
	tenant := newTenant(t, b, good.entry, good.answer.Platform)
	t.Run("policy", func(t *testing.T) { tenant.demands(t, good) })
	if err := tenant.judge(t, question("good"), good.entry, good.alone).Err(); err != nil {
		t.Errorf("the good host before its agent ran: %v", err)
	}
	if err := tenant.judge(t, question("good"), good.entry, good.answer).Err(); err != nil {
		t.Errorf("the good host: %v", err)
	}
	if tenant.judge(t, question("another"), good.entry, good.answer).Good() {
		t.Error("an answer to another question was accepted")
	}
	others := map[string]boot{}
	for _, c := range []struct {
		name          string
		change        func(*hostimage.Options)
		events, files []string
		says          string // in the refusal
	}{
		{"agent", func(o *hostimage.Options) { o.Agent = alter(t, o.Agent) }, nil, []string{"/host/foothold-host"}, `file "/host/foothold-host"`},
		{"argument", func(o *hostimage.Options) { o.Cmdline = "init_on_alloc=0" },
			[]string{"4 EV_EFI_BOOT_SERVICES_APPLICATION", "11 EV_IPL .cmdline", "9 EV_EVENT_TAG"}, []string{"boot_aggregate"}, "EV_IPL .cmdline, PCR 11"},
		{"module", func(o *hostimage.Options) { o.Modules = append(slices.Clone(o.Modules), "drivers/net/dummy.ko") }, nil, []string{"/host/modules/dummy.ko"}, `file "/host/modules/dummy.ko"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := b.options
			c.change(&o)
			other := b.run(t, c.name, o)
			others[c.name] = other
			if got := changedEvents(t, good, other); !slices.Equal(got, c.events) {
				t.Errorf("firmware's log differs in %q, want %q", got, c.events)
			}
			if got := changedFiles(good, other); !slices.Equal(got, c.files) {
				t.Errorf("kernel's list differs in %q, want %q", got, c.files)
			}
			verdict := tenant.judge(t, question(c.name), other.entry, other.answer)
			if verdict.Good() || !strings.Contains(verdict.Err().Error(), c.says) {
				t.Errorf("the verdict does not say %q: %v", c.says, verdict.Findings)
			}
			if len(c.events) == 0 && !bytes.Equal(good.firmware, other.firmware) {
				t.Error("the same firmware and UKI gave another log")
			}
		})
	}
	t.Run("files", func(t *testing.T) { b.ofFiles(t, good, others) })
}

// ofFiles makes reference values of the good host's files, with the firmware's part from one
// that booted another image: they accept the good host, whose logs they never saw, and refuse
// the others.
func (b *bench) ofFiles(t *testing.T, good boot, others map[string]boot) {
	uki, err := os.ReadFile(good.image.UKI())
	check(t, err)
	files, err := reference.Files(good.image.Root, hostimage.Root, nil)
	check(t, err)
	release := reference.Release{UKI: uki, Files: files}
	tenant := tenantBy(t, b, good.entry, func(doc *platform.Manifest) error {
		for _, word := range hostimage.Phases {
			doc.Userspace = append(doc.Userspace, platform.Text{PCR: platform.PhaseRegister, Text: word})
		}
		return release.Add(doc, others["argument"].firmware)
	})
	if err := tenant.judge(t, question("good"), good.entry, good.answer).Err(); err != nil {
		t.Errorf("the good host: %v", err)
	}
	for name, says := range map[string]string{"agent": `file "/host/foothold-host"`, "argument": ".cmdline, PCR 11", "module": `file "/host/modules/dummy.ko"`} {
		verdict := tenant.judge(t, question(name), others[name].entry, others[name].answer)
		if verdict.Good() || !strings.Contains(verdict.Err().Error(), says) {
			t.Errorf("%s: the verdict does not say %q: %v", name, says, verdict.Findings)
		}
	}
	// Without its log the same host is judged by the phases that the values name.
	good.answer.Platform.Userspace = nil
	if err := tenant.judge(t, question("good"), good.entry, good.answer).Err(); err != nil {
		t.Errorf("the good host without a system's log: %v", err)
	}
	none := tenantBy(t, b, good.entry, func(doc *platform.Manifest) error { return release.Add(doc, good.firmware) })
	verdict := none.judge(t, question("good"), good.entry, good.answer)
	if verdict.Good() || !strings.Contains(verdict.Err().Error(), `registers: the host's system has measured boot phase "enter-initrd", PCR 11, then`) {
		t.Errorf("phases that nobody named: %v", verdict.Findings)
	}
}

// alter gives the agent with one character of its usage text changed.
func alter(t *testing.T, agent string) string {
	t.Helper()
	data, err := os.ReadFile(agent)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(data, []byte("usage: foothold-host"))
	if at < 0 {
		t.Fatal("the agent has no usage text")
	}
	data[at] = 'U'
	out := filepath.Join(t.TempDir(), "foothold-host")
	if err := os.WriteFile(out, data, 0o755); err != nil {
		t.Fatal(err)
	}
	return out
}
