//go:build system

package host

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"foothold/protocol/hostapi"

	"golang.org/x/sys/unix"
)

// TestNobodyTypesAtTheConsole lets root of the host write to whatever QEMU has open by
// which a VM could be typed at, while the VM listens.
func TestNobodyTypesAtTheConsole(t *testing.T) {
	w := realWorld(t)
	w.run()
	c := w.client("acme-orchestrator")
	c.putTemplate()
	req := request("listening", 1)
	path := c.start(req)
	for began := time.Now(); !strings.Contains(c.console(path), "PROBE listens"); {
		if time.Since(began) > time.Minute {
			t.Fatalf("it does not listen:\n%s", c.console(path))
		}
		time.Sleep(100 * time.Millisecond) // the host API has no way to wait for a line
	}
	const typed = "\nintruder\n"
	wrote := typeAt(t, qemuPID(t, req.Spec.Network.MAC), typed)
	vm := c.await(path, hostapi.Stopped)
	console := c.console(path)
	told, rest, found := strings.Cut(console, "PROBE listens")
	before, _, ended := strings.Cut(rest, "PROBE heard nothing")
	if !found || !ended {
		t.Errorf("the VM heard something (%+v):\n%s%s", vm, told, rest)
	}
	// What is written to the console's pipe comes out beside what the VM says, and goes nowhere else.
	if wrote == 0 || !strings.Contains(before, "intruder") {
		t.Errorf("nothing was typed while the VM listened (%d files were written to): this shows nothing\n%s", wrote, console)
	}
}

// typeAt writes the text to each pipe and terminal of the process, and returns to how many.
func typeAt(t *testing.T, pid int, text string) (wrote int) {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil || len(files) == 0 {
		t.Fatalf("process %d has no open files: %v", pid, err)
	}
	for _, file := range files {
		target, err := os.Readlink(file)
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(target, "/dev/pts/") || strings.HasPrefix(target, "/dev/tty") || target == "/dev/ptmx" {
			t.Errorf("QEMU has a terminal open: %s", target)
		}
		if !strings.HasPrefix(target, "pipe:") {
			continue
		}
		f, err := os.OpenFile(file, os.O_WRONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.WriteString(text)
		f.Close()
		switch {
		case err == nil:
			wrote++
		case !errors.Is(err, unix.EPIPE): // a pipe that nobody reads any more
			t.Fatal(err)
		}
	}
	return wrote
}

// qemuPID finds the process that runs the VM with that MAC address.
func qemuPID(t *testing.T, mac string) int {
	t.Helper()
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, line := range lines {
		data, err := os.ReadFile(line)
		if err == nil && bytes.HasPrefix(data, []byte("qemu-system-x86_64\x00-L")) && bytes.Contains(data, []byte(mac)) {
			var pid int
			if _, err := fmt.Sscanf(line, "/proc/%d/", &pid); err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	t.Fatalf("no QEMU runs %s", mac)
	return 0
}
