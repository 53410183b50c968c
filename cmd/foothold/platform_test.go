package main

import (
	"bytes"
	"crypto/ed25519"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"foothold/internal/signingkey"
	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/imalog/imalogtest"
	"foothold/protocol/platform"
	"foothold/protocol/signed"
)

// realFirmwareLog is one of a real machine, from the authors of another library.
func realFirmwareLog(t *testing.T) []byte {
	t.Helper()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/google/go-attestation").Output()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(out)), "attest", "testdata", "ubuntu_2104_shielded_vm_no_secure_boot_eventlog"))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// runPlatform runs `foothold platform manifest ...` in this process.
func runPlatform(args ...string) (stdout string, err error) {
	root, out := rootCommand(), &bytes.Buffer{}
	root.SetOut(out)
	root.SetErr(&bytes.Buffer{})
	root.SetArgs(append([]string{"platform", "manifest"}, args...))
	err = root.Execute()
	return out.String(), err
}

func TestPlatformManifest(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	write := func(name string, data []byte) string {
		if err := os.WriteFile(path(name), data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path(name)
	}
	host := func(name string, files ...string) string {
		data, err := json.Marshal(evidence.Platform{Firmware: realFirmwareLog(t), Kernel: imalogtest.List(t, realFirmwareLog(t), files...)})
		if err != nil {
			t.Fatal(err)
		}
		return write(name, data)
	}
	create := func(name string, evidence ...string) (string, error) {
		args := []string{"create", "--name", name, "--bios", write("bios", []byte("b")), "--loader-kernel", write("k", []byte("k")),
			"--loader-initramfs", write("i", []byte("i")), "--loader-cmdline", "quiet", "--out", path(name)}
		for _, e := range evidence {
			args = append(args, "--evidence", e)
		}
		return runPlatform(args...)
	}
	if _, err := create("old", host("a", "/usr/bin/agent=1", "/usr/bin/qemu=1")); err != nil {
		t.Fatal(err)
	}
	if _, err := create("new", host("a", "/usr/bin/agent=2", "/usr/bin/qemu=1"), host("b", "/usr/bin/agent=2", "/usr/bin/qemu=1", "/usr/bin/new=1")); err != nil {
		t.Fatal(err)
	}
	// Logs are tried without anybody being asked.
	if tried, err := runPlatform("try", path("new"), "--evidence", path("a"), "--evidence", path("b")); err != nil || strings.Count(tried, "accepted") != 2 {
		t.Errorf("%v\n%s", err, tried)
	}
	tried, err := runPlatform("try", path("old"), "--evidence", path("a"))
	if err == nil || !strings.Contains(tried, `log: file "/usr/bin/agent"`) || !strings.Contains(tried, "proved by nothing") {
		t.Errorf("%v\n%s", err, tried)
	}
	key, err := signingkey.Ensure(path("key"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := runPlatform("sign", path("old"), "--key", path("key"), "--out", path("signed")); err != nil {
		t.Fatal(err)
	}
	var env signed.Envelope
	var doc platform.Manifest
	data, err := os.ReadFile(path("signed"))
	if err != nil || json.Unmarshal(data, &env) != nil || env.Open(key.Public().(ed25519.PublicKey), signed.Platform, &doc) != nil || doc.Name != "old" {
		t.Fatalf("signed: %v, %+v", err, doc)
	}
	shown, err := runPlatform("show", path("signed"))
	if err != nil || !strings.Contains(shown, "/usr/bin/agent") || !strings.Contains(shown, "EV_SEPARATOR") || !strings.Contains(shown, "SecureBoot") {
		t.Errorf("%v\n%s", err, shown)
	}
	diff, err := runPlatform("diff", path("signed"), path("new"))
	if err == nil || !strings.Contains(diff, "new      /usr/bin/new") || !strings.Contains(diff, "changed  /usr/bin/agent") || strings.Contains(diff, "qemu") {
		t.Errorf("%v\n%s", err, diff)
	}
	if same, err := runPlatform("diff", path("old"), path("signed")); err != nil || !strings.Contains(same, "no component differs") {
		t.Errorf("%v\n%s", err, same)
	}

	// The phases of the boot, from a system's log and by name.
	var logged evidence.Platform
	read, err := os.ReadFile(path("a"))
	if err != nil || json.Unmarshal(read, &logged) != nil {
		t.Fatal(err)
	}
	for _, word := range []string{"enter-initrd", "leave-initrd"} {
		logged.Userspace = fmt.Appendf(logged.Userspace, "\x1e"+`{"pcr":11,"digests":[{"hashAlg":"sha256","digest":"%s"}],"content_type":"systemd","content":{"string":%q}}`+"\n", digest.Of([]byte(word)), word)
	}
	if read, err = json.Marshal(logged); err != nil {
		t.Fatal(err)
	}
	if _, err := create("phases", write("c", read)); err != nil {
		t.Fatal(err)
	}
	more := []string{"create", "--name", "more", "--bios", path("bios"), "--loader-kernel", path("k"), "--loader-initramfs", path("i"), "--loader-cmdline", "quiet", "--evidence", path("c"), "--out", path("more"), "--phases"}
	if _, err := runPlatform(append(more, "enter-initrd:leave-initrd:sysinit")...); err != nil {
		t.Fatal(err)
	}
	if diff, err := runPlatform("diff", path("phases"), path("more")); err == nil || !strings.Contains(diff, `new      boot phase "sysinit", PCR 11`) || strings.Contains(diff, "initrd") {
		t.Errorf("%v\n%s", err, diff)
	}
	if shown, err := runPlatform("show", path("more")); err != nil || !strings.Contains(shown, `boot phase "enter-initrd"`) {
		t.Errorf("%v\n%s", err, shown)
	}
	tried, err = runPlatform("try", path("old"), "--evidence", path("c"))
	if err == nil || !strings.Contains(tried, `log: boot phase "enter-initrd", PCR 11`) {
		t.Errorf("%v\n%s", err, tried)
	}
	if _, err := runPlatform("try", path("more"), "--evidence", path("c")); err != nil {
		t.Error(err)
	}
	for _, words := range []string{"sysinit:ready", "enter-initrd::ready", ":"} {
		if _, err := runPlatform(append(more, words)...); err == nil {
			t.Errorf("--phases %s beside a log of others: accepted", words)
		}
	}

	// What an orchestrator would refuse is not signed.
	doc.Boot = doc.Boot[1:]
	doc.Files = nil
	bad, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := runPlatform("sign", write("bad", bad), "--key", path("key"), "--out", path("signed-bad")); err == nil {
		t.Error("signed what names no files")
	}
	if _, err := os.Stat(path("signed-bad")); err == nil {
		t.Error("it was written")
	}
	if _, err := create("broken", write("c", []byte(`{"firmware":"AAAA","kernel":""}`))); err == nil {
		t.Error("made reference values of garbled evidence")
	}
}

// unified is a unified kernel image of the least that one has.
func unified(stub string) []byte {
	const pe, optional, table = 0x40, 0x40 + 24, 0x40 + 24 + 112
	program := func(sections ...string) []byte {
		headers := table + len(sections)/2*40
		out := make([]byte, headers)
		binary.LittleEndian.PutUint32(out[0x3c:], pe)
		copy(out[pe:], "PE\x00\x00")
		binary.LittleEndian.PutUint16(out[pe+6:], uint16(len(sections)/2))
		binary.LittleEndian.PutUint16(out[pe+20:], table-optional)
		binary.LittleEndian.PutUint16(out[optional:], 0x20b)
		binary.LittleEndian.PutUint32(out[optional+60:], uint32(headers))
		for i := 0; i < len(sections); i += 2 {
			header, data := out[table+i/2*40:], sections[i+1]
			copy(header[:8], sections[i])
			binary.LittleEndian.PutUint32(header[8:], uint32(len(data)))
			binary.LittleEndian.PutUint32(header[16:], uint32(len(data)))
			binary.LittleEndian.PutUint32(header[20:], uint32(len(out)))
			out = append(out, data...)
		}
		return out
	}
	return program(".sdmagic", stub, ".linux", string(program(".text", "kernel")), ".cmdline", "quiet", ".initrd", "initramfs")
}

func TestPlatformManifestOfFiles(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	write := func(name string, data []byte) string {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path(name), data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path(name)
	}
	firmware := realFirmwareLog(t)
	old, err := json.Marshal(evidence.Platform{Firmware: firmware, Kernel: imalogtest.List(t, firmware, "/usr/bin/old=1")})
	if err != nil {
		t.Fatal(err)
	}
	write("root/bin/agent", []byte("agent"))
	write("root/share/doc", []byte("doc"))
	base := []string{"create", "--name", "new", "--evidence", write("evidence", old), "--bios", write("bios", []byte("b")), "--loader-kernel", write("k", []byte("k")),
		"--loader-initramfs", write("i", []byte("i")), "--out", path("new")}
	create := func(args ...string) error {
		_, err := runPlatform(append(append([]string{}, base...), args...)...)
		return err
	}
	image, menu := write("uki", unified("LoaderInfo: systemd-stub 252")), write("menu", unified("menu"))
	if err := create("--uki", image, "--root", path("root")+":/usr", "--skip", "/usr/share", "--boot-menu", menu, "--kernel-cmdline", "quiet debug", "--phases", "ready"); err != nil {
		t.Fatal(err)
	}
	doc, _, err := readManifest(path("new"))
	if err != nil {
		t.Fatal(err)
	}
	if want := (platform.File{Name: "/usr/bin/agent", SHA256: digest.Of([]byte("agent"))}); len(doc.Files) != 1 || doc.Files[0] != want || len(doc.Userspace) != 1 {
		t.Errorf("%v, want %v alone; %v", doc.Files, want, doc.Userspace)
	}
	var components []string
	for _, e := range doc.Boot {
		if e.PCR == 4 || e.PCR > 7 {
			components = append(components, fmt.Sprintf("%d %s", e.PCR, e.Component))
		}
	}
	want := []string{"4 EV_EFI_ACTION Calling EFI Application from Boot Option", "4 EV_SEPARATOR", "4 boot loader 1", "4 unified kernel image", "4 kernel",
		"9 kernel command line", "9 initramfs", "11 .linux, its name", "11 .linux", "11 .cmdline, its name", "11 .cmdline", "11 .initrd, its name", "11 .initrd", "12 kernel command line from outside the image"}
	if !slices.Equal(components, want) {
		t.Errorf("%q, want %q", components, want)
	}
	for name, args := range map[string][]string{
		"an image alone":     {"--uki", image},
		"a root alone":       {"--root", path("root")},
		"a menu alone":       {"--boot-menu", menu},
		"a root without one": {"--uki", image, "--root", path("none")},
		"a relative mount":   {"--uki", image, "--root", path("root") + ":usr"},
		"nothing left":       {"--uki", image, "--root", path("root"), "--skip", "/"},
		"no image":           {"--uki", menu, "--root", path("root")},
		"no file":            {"--uki", path("none"), "--root", path("root")},
	} {
		if err := create(args...); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := runPlatform("sign", path("new"), "--key", ensureKey(t, path("key")), "--out", path("signed")); err != nil {
		t.Error(err)
	}
}

func ensureKey(t *testing.T, file string) string {
	t.Helper()
	if _, err := signingkey.Ensure(file); err != nil {
		t.Fatal(err)
	}
	return file
}
