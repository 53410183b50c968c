package upstreamtest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"foothold/internal/config"
	"foothold/internal/nstest"

	"github.com/goccy/go-yaml"
)

// daemonConfig names the configuration in the environment of a [Daemon].
const daemonConfig = "FOOTHOLD_TEST_DAEMON"

// Main replaces a call of tests in TestMain: in a process that is a [Daemon] it runs the
// daemon, everywhere else the tests. It returns the exit code.
func Main[C any](run func(context.Context, C) error, tests func() int) int {
	file := os.Getenv(daemonConfig)
	if file == "" {
		return tests()
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	var c C
	err := config.Read(file, &c)
	if err == nil {
		err = run(ctx, c)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// Daemon is the daemon that [Main] knows, as a process of its own, which can be killed and
// started again.
type Daemon struct {
	t     testing.TB
	place *nstest.Place
	file  string
	cmd   *exec.Cmd // the last that was started
}

// NewDaemon configures one, which is to run in a place; nil is the test's own. Nothing
// runs yet.
func NewDaemon(t testing.TB, place *nstest.Place, conf any) *Daemon {
	t.Helper()
	data, err := yaml.Marshal(conf)
	must(t, err)
	d := &Daemon{t: t, place: place, file: filepath.Join(t.TempDir(), "daemon.yaml")}
	must(t, os.WriteFile(d.file, data, 0o600))
	return d
}

// Start begins a process, which ends with the test. What it wrote is shown if the test
// fails.
func (d *Daemon) Start() {
	d.t.Helper()
	var log bytes.Buffer
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), daemonConfig+"="+d.file)
	cmd.Stderr = &log
	if d.place == nil {
		must(d.t, cmd.Start())
	} else {
		d.place.Do(d.t, cmd.Start)
	}
	d.cmd = cmd
	d.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if d.t.Failed() {
			d.t.Logf("daemon:\n%s", &log)
		}
	})
}

// Wait waits for the end of the process and returns why it failed.
func (d *Daemon) Wait() error { return d.cmd.Wait() }

// Stop sends a signal and waits for the end, which SIGTERM makes an orderly one.
func (d *Daemon) Stop(s syscall.Signal) {
	d.t.Helper()
	must(d.t, d.cmd.Process.Signal(s))
	ended := make(chan error, 1)
	go func() { ended <- d.cmd.Wait() }()
	select {
	case err := <-ended:
		if s == syscall.SIGTERM && err != nil {
			d.t.Errorf("daemon ended with %v", err)
		}
	case <-time.After(8 * time.Second):
		d.t.Fatal("daemon does not end")
	}
}
