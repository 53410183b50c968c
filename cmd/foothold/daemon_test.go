package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"foothold/internal/harden/hardentest"

	"golang.org/x/sys/unix"
)

// capabilities that daemons keep. One that is not named here may keep none.
var capabilities = map[string][]uintptr{
	"foothold firewall": {unix.CAP_NET_ADMIN},
	"foothold gateway":  {unix.CAP_NET_ADMIN},
	"foothold-host run": {unix.CAP_NET_ADMIN},
}

// unbounded are the daemons that may open other files than package fence names.
var unbounded = map[string]string{
	"foothold orchestrator run": "runs cryptsetup, which opens what it likes",
	"foothold-host run":         "runs QEMU, and its binary is measured: it takes no further module",
}

// starters are the daemons that start programs.
var starters = map[string]bool{"foothold orchestrator run": true, "foothold-host run": true}

// daemons are the commands that run by a configuration file.
func daemons() []string {
	found := []string{"foothold-host run"}
	pending := rootCommand().Commands()
	for len(pending) > 0 {
		c := pending[0]
		pending = append(pending[1:], c.Commands()...)
		if c.Flags().Lookup("config") != nil {
			found = append(found, c.CommandPath())
		}
	}
	return found
}

// nobody is an ordinary user of every system.
const nobody = 65534

// TestDaemonsAreHardened starts every daemon, as root too if it can, and looks at it when it is
// about to read its configuration.
func TestDaemonsAreHardened(t *testing.T) {
	if n := len(daemons()); n < 6 {
		t.Fatalf("only %d daemons found", n)
	}
	dir := buildDaemons(t)
	users := map[string]*syscall.Credential{"as we are": nil}
	if os.Geteuid() == 0 {
		users["an ordinary user"] = &syscall.Credential{Uid: nobody, Gid: nobody}
	}
	for who, credential := range users {
		for _, name := range daemons() {
			t.Run(name+"/"+who, func(t *testing.T) {
				d := startDaemon(t, dir, name, credential)
				all := os.Geteuid() == 0 && credential == nil
				hardentest.Check(t, hardentest.Process{PID: d.cmd.Process.Pid, Keep: capabilities[name], All: all, Alone: !starters[name]})
				// This much of a configuration says which files are the daemon's, and no more.
				said := d.configure(t, "state: "+filepath.Join(t.TempDir(), "state")+"\n")
				if unbounded[name] == "" && credential == nil && !strings.Contains(said, "files bounded") && !strings.Contains(said, "no Landlock") {
					t.Errorf("it does not bound its files: %s", said)
				}
			})
		}
	}
}

// buildDaemons builds the daemons as a release does, where any user may run them.
func buildDaemons(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "daemons-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", dir+"/", ".", "../foothold-host")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return dir
}

// waitingDaemon is one that waits for somebody to write its configuration.
type waitingDaemon struct {
	cmd    *exec.Cmd
	config *os.File
	stderr *bytes.Buffer
	ended  chan struct{}
}

// startDaemon starts a daemon with a pipe for a configuration. It returns when the
// daemon has opened it, and so waits in the midst of its start.
func startDaemon(t *testing.T, dir, name string, credential *syscall.Credential) *waitingDaemon {
	t.Helper()
	file := filepath.Join(dir, strings.ReplaceAll(name+t.Name(), "/", "-"))
	if err := unix.Mkfifo(file, 0o600); err != nil {
		t.Fatal(err)
	}
	if credential != nil {
		if err := os.Chown(file, int(credential.Uid), int(credential.Gid)); err != nil {
			t.Fatal(err)
		}
	}
	words := strings.Fields(name)
	d := &waitingDaemon{stderr: &bytes.Buffer{}, ended: make(chan struct{})}
	d.cmd = exec.Command(filepath.Join(dir, words[0]), append(words[1:], "--config", file)...)
	d.cmd.Dir, d.cmd.Stderr = "/", d.stderr
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: credential}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { d.cmd.Wait(); close(d.ended) }()
	t.Cleanup(func() {
		d.cmd.Process.Kill()
		<-d.ended
	})
	for {
		fd, err := unix.Open(file, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err == nil {
			d.config = os.NewFile(uintptr(fd), file)
			return d
		}
		if !errors.Is(err, unix.ENXIO) { // nobody reads it yet
			t.Fatal(err)
		}
		select {
		case <-d.ended:
			t.Fatalf("it ended before it read its configuration: %s", d.stderr)
		case <-time.After(time.Millisecond):
		}
	}
}

// configure writes the configuration and returns what the daemon says until it ends.
func (d *waitingDaemon) configure(t *testing.T, text string) string {
	t.Helper()
	if _, err := d.config.WriteString(text); err != nil {
		t.Fatal(err)
	}
	d.config.Close()
	select {
	case <-d.ended:
	case <-time.After(20 * time.Second):
		t.Fatal("it goes on with next to no configuration")
	}
	return d.stderr.String()
}
