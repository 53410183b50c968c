package hostport

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"foothold/protocol/vmspec"
)

// TestPortIsWaitedFor: the port to the host may be named after the first look, or its
// device made after that; one that does not come is named.
func TestPortIsWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ports, devices := filepath.Join(t.TempDir(), "virtio-ports"), t.TempDir()
		write := func(file, text string) {
			if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
				t.Error(err)
			}
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Error(err)
			}
		}
		go func() {
			time.Sleep(time.Second)
			write(filepath.Join(ports, "vport1p1", "name"), "another\n")
			time.Sleep(time.Second)
			write(filepath.Join(ports, "vport1p2", "name"), vmspec.ChannelPort+"\n")
			time.Sleep(time.Second)
			write(filepath.Join(devices, "vport1p2"), "")
		}()
		began := time.Now()
		f, err := open(ports, devices)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if f.Name() != filepath.Join(devices, "vport1p2") || time.Since(began) < 3*time.Second {
			t.Errorf("%s after %v", f.Name(), time.Since(began))
		}
	})
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		if _, err := open(t.TempDir(), t.TempDir()); err == nil || !strings.Contains(err.Error(), vmspec.ChannelPort) {
			t.Errorf("no port: %v", err)
		}
		if d := time.Since(began); d < within || d > within+time.Second {
			t.Errorf("given up after %v", d)
		}
	})
}
