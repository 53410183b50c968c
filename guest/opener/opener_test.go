package opener

import (
	"os"
	"path/filepath"
	"testing"

	"foothold/internal/luks"
	"foothold/internal/secret"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/unlockmsg"

	"golang.org/x/sys/unix"
)

func TestCheckRefusesOtherDisks(t *testing.T) {
	pass := secret.Random(32)
	header, err := luks.Header(t.Context(), 1<<20, luks.NewKey(), pass)
	if err != nil {
		t.Fatal(err)
	}
	good := func() unlockmsg.Handover {
		disk := func(device string) unlockmsg.Disk {
			return unlockmsg.Disk{Device: device, Header: append([]byte{}, header...), Passphrase: pass}
		}
		return unlockmsg.Handover{Template: disk("vda"), Volume: disk("vdb"), Verity: unlockmsg.Verity{RootHash: digest.Of([]byte("x")), HashOffset: 4096}}
	}
	h := good()
	if err := Check(&h); err != nil {
		t.Fatal(err)
	}
	for name, bend := range map[string]func(*unlockmsg.Handover){
		"disks swapped":      func(h *unlockmsg.Handover) { h.Template.Device, h.Volume.Device = "vdb", "vda" },
		"a path":             func(h *unlockmsg.Handover) { h.Volume.Device = "../vdb" },
		"template formatted": func(h *unlockmsg.Handover) { h.Template.Format = true },
		"template with tags": func(h *unlockmsg.Handover) { h.Template.Authenticated = true },
		"altered header":     func(h *unlockmsg.Handover) { h.Template.Header[5000] ^= 1 },
		"cut header":         func(h *unlockmsg.Handover) { h.Volume.Header = h.Volume.Header[:4096] },
		"no header":          func(h *unlockmsg.Handover) { h.Volume.Header = nil },
		"short passphrase":   func(h *unlockmsg.Handover) { h.Volume.Passphrase = secret.Random(16) },
		"no root hash":       func(h *unlockmsg.Handover) { h.Verity.RootHash = digest.SHA256{} },
		"no hash offset":     func(h *unlockmsg.Handover) { h.Verity.HashOffset = 0 },
		"odd hash offset":    func(h *unlockmsg.Handover) { h.Verity.HashOffset = 4097 },
	} {
		h := good()
		bend(&h)
		if err := Check(&h); event.ReasonOf(err) != event.DiskRefused {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestPopulateIsWholeOrNot(t *testing.T) {
	from, to := t.TempDir(), filepath.Join(t.TempDir(), "var")
	os.MkdirAll(filepath.Join(from, "lib/x"), 0o755)
	os.WriteFile(filepath.Join(from, "lib/x/f"), []byte("data"), 0o640)
	os.Symlink("lib", filepath.Join(from, "link"))
	os.MkdirAll(filepath.Join(to+".partial", "left"), 0o755) // of a start that was cut off
	if err := populate(from, to, 0o755); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(to, "lib/x/f"))
	if err != nil || info.Mode() != 0o640 {
		t.Errorf("%v, %v", info, err)
	}
	if target, _ := os.Readlink(filepath.Join(to, "link")); target != "lib" {
		t.Errorf("link goes to %q", target)
	}
	if _, err := os.Stat(filepath.Join(to, "left")); err == nil {
		t.Error("what a cut-off start left is taken over")
	}
}

func TestRemoveFreesATree(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "x")
	os.MkdirAll(filepath.Join(dir, "a/b"), 0o755)
	os.WriteFile(filepath.Join(dir, "a/b/f"), nil, 0o600)
	os.Symlink("/etc", filepath.Join(dir, "a/etc"))
	if err := remove(dir, device(t, dir)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(dir); !os.IsNotExist(err) {
		t.Error("the tree is still there")
	}
	if _, err := os.Stat("/etc"); err != nil {
		t.Fatal("a link was followed")
	}
	os.Mkdir(dir, 0o755)
	if err := remove(dir, device(t, dir)+1); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(dir); err != nil {
		t.Error("another file system's directory is removed")
	}
}

func device(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Dev
}

func TestClearingsCoverEdgesAndGroups(t *testing.T) {
	const group = fsGroup * fsBlock
	for _, size := range []int64{64 << 10, 1 << 20, group, group + fsBlock, 8*group + 12*fsBlock} {
		cleared := func(at int64) bool {
			for _, c := range clearings(size) {
				if c.start < 0 || c.length <= 0 || c.start+c.length > size || c.start%fsBlock != 0 {
					t.Errorf("%d: %+v is not inside", size, c)
				}
				if at >= c.start && at+fsBlock <= c.start+c.length {
					return true
				}
			}
			return false
		}
		for at := int64(0); at+fsBlock <= size; at += group {
			if !cleared(at) {
				t.Errorf("%d: the group at %d is not cleared", size, at)
			}
		}
		for at := size - 64<<10; at+fsBlock <= size; at += fsBlock {
			if !cleared(at) {
				t.Errorf("%d: the end is not cleared at %d", size, at)
			}
		}
	}
}

func TestOnlyANewVolumeIsFilled(t *testing.T) {
	template, volume := t.TempDir(), filepath.Join(t.TempDir(), "var")
	os.WriteFile(filepath.Join(template, "f"), nil, 0o600)
	if err := provide(template, volume, 0o755, false); err == nil {
		t.Error("an older volume may lack its folder")
	}
	if _, err := os.Lstat(volume); err == nil {
		t.Error("it was filled")
	}
	if err := provide(template, volume, 0o755, true); err != nil {
		t.Fatal(err)
	}
	if err := provide(template, volume, 0o755, false); err != nil {
		t.Errorf("an older volume with its folder: %v", err)
	}
	os.RemoveAll(volume)
	os.Symlink("/etc", volume)
	if err := provide(template, volume, 0o755, false); err == nil {
		t.Error("a link may stand for the folder")
	}
}
