//go:build system

package host

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"foothold/internal/durable"
	"foothold/protocol/hostapi"

	"github.com/goccy/go-yaml"
)

// TestVMsDieWithTheAgent kills the agent, as a process, and looks for what is left.
func TestVMsDieWithTheAgent(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "foothold-host")
	build := exec.Command("go", "build", "-o", binary, "foothold/cmd/foothold-host")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build agent: %v\n%s", err, out)
	}
	config := filepath.Join(t.TempDir(), "config.yaml")
	w := realWorldWith(t, config)
	start := func() *exec.Cmd {
		cmd := exec.Command(binary, "run", "--config", config)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		w.wait()
		return cmd
	}
	agent := start()
	c := w.client("acme-orchestrator")
	c.putTemplate()
	req := request("silent", 1)
	path := c.start(req)
	if n := running(t, req.Spec.Network.MAC); n != 1 {
		t.Fatalf("%d QEMU processes", n)
	}
	if err := agent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	agent.Wait()
	for deadline := time.Now().Add(10 * time.Second); running(t, req.Spec.Network.MAC) > 0 || len(taps(t)) > 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("left behind: %d QEMU processes, taps %v", running(t, req.Spec.Network.MAC), taps(t))
		}
	}
	start()
	c = w.client("acme-orchestrator")
	var vm hostapi.VM
	c.ok("GET", path, nil, &vm)
	if vm.State != hostapi.Stopped || vm.Reason != "vm-stopped" {
		t.Errorf("after the crash %+v", vm)
	}
	next := request("silent", 2)
	if again := c.start(next); again != path {
		t.Errorf("another id: %s", again)
	}
	c.ok("DELETE", path, nil, nil)
	if n := running(t, req.Spec.Network.MAC); n != 0 {
		t.Errorf("%d QEMU processes are left", n)
	}
}

// running counts the QEMU processes with that MAC address.
func running(t *testing.T, mac string) (n int) {
	t.Helper()
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, line := range lines {
		if data, err := os.ReadFile(line); err == nil && bytes.HasPrefix(data, []byte("qemu-system-x86_64\x00-L")) && bytes.Contains(data, []byte(mac)) {
			n++
		}
	}
	return n
}

// realWorldWith is realWorld with its configuration as the file that is measured.
func realWorldWith(t *testing.T, config string) *world {
	w := realWorld(t)
	data, err := yaml.Marshal(w.conf)
	if err != nil {
		t.Fatal(err)
	}
	if err := durable.WriteFile(config, data, 0o600); err != nil {
		t.Fatal(err)
	}
	w.measure(config)
	return w
}
