package measure

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"foothold/protocol/imalog"
	"foothold/protocol/systemdlog"
	"foothold/protocol/tcglog"

	"golang.org/x/sys/unix"
)

func TestLogsAreWholeOrAnError(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, size int) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	firmware, kernel, userspace := file("firmware", tcglog.MaxSize), file("kernel", imalog.MaxSize), file("userspace", systemdlog.MaxSize)
	p, err := Logs{Firmware: firmware, Kernel: kernel, Userspace: userspace}.Read()
	if err != nil || len(p.Firmware) != tcglog.MaxSize || len(p.Kernel) != imalog.MaxSize || len(p.Userspace) != systemdlog.MaxSize {
		t.Errorf("logs as large as may be: %d, %d and %d bytes, %v", len(p.Firmware), len(p.Kernel), len(p.Userspace), err)
	}
	if p, err := (Logs{Firmware: firmware, Kernel: kernel}).Read(); err != nil || p.Userspace != nil {
		t.Errorf("without a system's log: %d bytes, %v", len(p.Userspace), err)
	}
	none, empty := filepath.Join(dir, "none"), file("empty", 0)
	for name, c := range map[string]struct{ firmware, kernel, userspace, want string }{
		"large firmware log": {file("large", tcglog.MaxSize+1), kernel, userspace, "more than"},
		"large kernel list":  {firmware, file("larger", imalog.MaxSize+1), userspace, "more than"},
		"large system's log": {firmware, kernel, file("long", systemdlog.MaxSize+1), "more than"},
		"empty firmware log": {empty, kernel, userspace, "is empty"},
		"empty kernel list":  {firmware, empty, userspace, "is empty"},
		"empty system's log": {firmware, kernel, empty, "is empty"},
		"no firmware log":    {none, kernel, userspace, "securityfs"},
		"no kernel list":     {firmware, none, userspace, "ima_policy"},
		"no system's log":    {firmware, kernel, none, "may this user read it"},
	} {
		p, err := Logs{Firmware: c.firmware, Kernel: c.kernel, Userspace: c.userspace}.Read()
		if err == nil || !strings.Contains(err.Error(), c.want) || p.Firmware != nil || p.Kernel != nil || p.Userspace != nil {
			t.Errorf("%s: %d, %d and %d bytes, %v", name, len(p.Firmware), len(p.Kernel), len(p.Userspace), err)
		}
	}
}

// A record that is being written is waited for: its register is extended already.
func TestASystemsLogIsReadBetweenItsRecords(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	writer, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	if err := unix.Flock(int(writer.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if _, err := writer.WriteString("half a "); err != nil {
		t.Fatal(err)
	}
	read := make(chan string)
	go func() {
		data, err := readLocked(path, systemdlog.MaxSize)
		if err != nil {
			t.Error(err)
		}
		read <- string(data)
	}()
	select {
	case got := <-read:
		t.Fatalf("read while it is written: %q", got)
	case <-time.After(10 * lockRetry):
	}
	if _, err := writer.WriteString("record"); err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(writer.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	if got := <-read; got != "half a record" {
		t.Errorf("%q", got)
	}
}
