package host

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"foothold/internal/nstest"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/hostapi"
	"foothold/protocol/inventory"
)

// files lists what lies below dir.
func files(t testing.TB, dir string) (list []string) {
	t.Helper()
	if err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			list = append(list, path)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return list
}

// refusedFull makes a call that must be refused for the full disk, and leave nothing.
func (w *world) refusedFull(c *client, method, path string, body any) {
	w.t.Helper()
	before := strings.Join(files(w.t, w.conf.State), " ")
	status, answer := c.call(method, path, body)
	if status != http.StatusInsufficientStorage || !strings.Contains(string(answer), `"`+string(event.DiskFull)+`"`) {
		w.t.Errorf("%s %s: %d %s", method, path, status, answer)
	}
	if after := strings.Join(files(w.t, w.conf.State), " "); after != before {
		w.t.Errorf("%s %s left %s, there was %s", method, path, after, before)
	}
}

// TestDiskFull: what finds no room is refused by that name and leaves nothing behind;
// with room, the same is accepted.
func TestDiskFull(t *testing.T) {
	disk := nstest.SmallDisk(t, "size=80m")
	w := newWorld(t, func(c *Config, _ inventory.Host) { c.State = disk.Path })
	w.run()
	c := w.client("acme-orchestrator")
	c.putTemplate()
	c.ok("POST", "/v1/vms", request("web", 1), nil)

	large := strings.Repeat("large", 8<<20)
	path := "/v1/templates/" + digest.Of([]byte(large)).String()
	w.refusedFull(c, "PUT", path, large)
	w.refusedFull(c, "POST", "/v1/vms", request("large", 1)) // its volume
	disk.Fill(t)
	w.refusedFull(c, "PUT", path, large[:64])
	w.refusedFull(c, "POST", "/v1/vms", request("web-2", 1))
	var list []hostapi.VM
	if c.ok("GET", "/v1/vms", nil, &list); len(list) != 1 || list[0].State != hostapi.Created {
		t.Errorf("the VM that there was: %+v", list)
	}
	disk.Free(t)
	c.ok("DELETE", "/v1/vms/"+list[0].ID, nil, nil)
	c.ok("DELETE", "/v1/volumes/"+list[0].ID, nil, nil)
	c.ok("PUT", path, large, nil)
	c.ok("DELETE", path, nil, nil)
	c.ok("POST", "/v1/vms", request("large", 1), nil)
}

// TestVolumeIsAllocated: a volume's space is its own from the first, so that a disk that
// fills up later cannot fail the guest's writes.
func TestVolumeIsAllocated(t *testing.T) {
	disk := nstest.SmallDisk(t, "size=80m")
	w := newWorld(t, func(c *Config, _ inventory.Host) { c.State = disk.Path })
	w.run()
	c := w.client("acme-orchestrator")
	c.putTemplate()
	req := request("web", 1)
	c.ok("POST", "/v1/vms", req, nil)
	volume := filepath.Join(disk.Path, "volumes", "acme", req.Spec.Volume.ID+volumeSuffix)
	var s syscall.Stat_t
	if err := syscall.Stat(volume, &s); err != nil {
		t.Fatal(err)
	}
	if s.Size != 64<<20 || s.Blocks*512 < s.Size {
		t.Errorf("the volume has %d bytes, %d of them allocated", s.Size, s.Blocks*512)
	}
	disk.Fill(t)
	f, err := os.OpenFile(volume, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for at := int64(0); at < s.Size; at += 1 << 20 {
		if _, err := f.WriteAt(make([]byte, 1<<20), at); err != nil {
			t.Fatalf("write to the volume at %d on a full disk: %v", at, err)
		}
	}
}
