package template

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"foothold/internal/cpio"
	"foothold/internal/kmod"
	"foothold/protocol/audit"
	"foothold/protocol/bundle"
	"foothold/protocol/digest"
	"foothold/tenant/expect"

	"github.com/klauspost/compress/zstd"
)

// synthetic writes a template whose initramfs holds just enough.
func synthetic(t *testing.T) *Template {
	t.Helper()
	var list bytes.Buffer
	if err := kmod.Format(&list, []kmod.Module{{Name: "dm_mod", Path: "/lib/modules/dm-mod.ko"}, {Name: "dm_crypt", Path: "/lib/modules/dm-crypt.ko", Needs: []string{"dm_mod"}}}, nil); err != nil {
		t.Fatal(err)
	}
	archive, err := cpio.Bytes([]cpio.Entry{
		cpio.File("init", 0o755, []byte("agent")),
		cpio.Link("lib64", "usr/lib64"),
		cpio.File(kmod.ListFile[1:], 0o644, list.Bytes()),
	})
	if err != nil {
		t.Fatal(err)
	}
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, initramfsFile), enc.EncodeAll(archive, nil), 0o600); err != nil {
		t.Fatal(err)
	}
	return &Template{Name: "debian", Release: "6.1.0", dir: dir, Contents: Contents{
		Users: []audit.User{{Name: "root", UID: 0, Shell: "/bin/bash", Locked: true}},
		Programs: []audit.File{
			{Path: "/usr/bin/dash", Mode: 0o755, SHA256: digest.Of([]byte("dash"))},
			{Path: "/usr/bin/systemctl", Mode: 0o755, SHA256: digest.Of([]byte("ctl"))},
			{Path: "/usr/bin/systemd-run", Mode: 0o755, SHA256: digest.Of([]byte("run"))},
			{Path: "/usr/bin/umount", Mode: 0o755, SHA256: digest.Of([]byte("umount"))},
			{Path: "/usr/lib/systemd/systemd", Mode: 0o755, SHA256: digest.Of([]byte("systemd"))},
			{Path: "/usr/lib/systemd/systemd-journald", Mode: 0o755, SHA256: digest.Of([]byte("journald"))},
			{Path: "/usr/lib/systemd/systemd-shutdown", Mode: 0o755, SHA256: digest.Of([]byte("shutdown"))},
		},
	}}
}

func TestExpectationsFollowTheInitramfsAndTheImage(t *testing.T) {
	e, err := synthetic(t).Expectations()
	if err != nil {
		t.Fatal(err)
	}
	if e.Kernel != "6.1.0" || e.Agent != digest.Of([]byte("agent")) || !slices.Equal(e.Modules, []string{"dm_mod", "dm_crypt"}) {
		t.Errorf("kernel %q, agent %s, modules %q", e.Kernel, e.Agent, e.Modules)
	}
	for _, want := range []expect.File{
		{Path: "/init", SHA256: digest.Of([]byte("agent"))},
		{Path: "/lib64", SHA256: digest.Of([]byte("usr/lib64"))},
		{Path: "/" + bundle.UniquePath},
	} {
		if !slices.Contains(e.Initramfs.Files, want) {
			t.Errorf("%+v is not among %+v", want, e.Initramfs.Files)
		}
	}
	dash := func(p expect.Program) bool { return p.Path == "/usr/bin/dash" }
	if len(e.OS.Programs) != 6 || slices.ContainsFunc(e.OS.Programs, dash) || len(e.OS.Users) != 1 {
		t.Errorf("OS %+v", e.OS)
	}
	text, err := e.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := expect.Parse(text); err != nil {
		t.Errorf("the expectations do not parse back: %v", err)
	}
}

func TestExpectationsWantTheAgent(t *testing.T) {
	tmpl := synthetic(t)
	enc, _ := zstd.NewWriter(nil)
	archive, _ := cpio.Bytes([]cpio.Entry{cpio.File("other", 0o755, nil)})
	if err := os.WriteFile(tmpl.Initramfs(), enc.EncodeAll(archive, nil), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := tmpl.Expectations(); err == nil {
		t.Error("an initramfs without /init is accepted")
	}
	if err := os.WriteFile(tmpl.Initramfs(), []byte("no archive"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := tmpl.Expectations(); err == nil {
		t.Error("rubbish is accepted")
	}
}
