//go:build system

package e2e

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"foothold/client"
)

// commandLimit ends a command that hangs. A template's first build is the longest.
const commandLimit = 10 * time.Minute

// system is one lab in a folder of its own, driven by the built binaries.
type system struct {
	foothold string // bin/foothold
	bin      string
	build    string // cache of what is slow to make
	state    string
	context  string // file
}

// newSystem brings a lab up and takes it down when the test ends.
func newSystem(t *testing.T) *system {
	t.Helper()
	s := &system{bin: folder(t, "FOOTHOLD_BIN", "bin"), build: folder(t, "FOOTHOLD_BUILD", "build"), state: filepath.Join(t.TempDir(), "lab")}
	s.foothold = filepath.Join(s.bin, "foothold")
	for _, program := range []string{"foothold", "foothold-host", "foothold-loader", "foothold-guest", "foothold-audit", "sample-web"} {
		if _, err := os.Stat(filepath.Join(s.bin, program)); err != nil {
			t.Fatalf("%v; `make build` makes it", err)
		}
	}
	s.context = filepath.Join(s.state, "context.yaml")
	t.Cleanup(func() {
		if t.Failed() {
			s.keepLogs(t)
		}
		s.run(context.Background(), "lab", "down", "--state", s.state)
	})
	if r := s.run(t.Context(), "lab", "up", "--state", s.state); r.code != 0 {
		t.Fatalf("lab up: exit code %d\n%s", r.code, r.stderr)
	}
	return s
}

// folder is a folder of the clone, which lies above this package's.
func folder(t *testing.T, variable, name string) string {
	t.Helper()
	dir := os.Getenv(variable)
	if dir == "" {
		dir = filepath.Join("..", name)
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		t.Fatal(err)
	}
	return abs
}

// keepLogs copies the daemons' logs to where they survive the test.
func (s *system) keepLogs(t *testing.T) {
	dir := filepath.Join(s.build, "failed-"+t.Name())
	if err := os.RemoveAll(dir); err != nil {
		t.Log(err)
	}
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(s.state, "logs"))); err != nil {
		t.Log(err)
	}
	t.Logf("the daemons' logs are in %s", dir)
}

// result of a command.
type result struct {
	stdout, stderr string
	code           int
}

func (s *system) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, s.foothold, args...)
	// The test's own context, and nothing remembered of or by the user's labs.
	cmd.Env = append(os.Environ(), client.Variable+"="+s.context, "XDG_STATE_HOME="+filepath.Join(s.state, "user"), "NO_COLOR=1")
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 20 * time.Second
	return cmd
}

// run runs foothold.
func (s *system) run(ctx context.Context, args ...string) result {
	ctx, stop := context.WithTimeout(ctx, commandLimit)
	defer stop()
	cmd := s.command(ctx, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	r := result{out.String(), errs.String(), cmd.ProcessState.ExitCode()}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		r.code, r.stderr = -1, err.Error()
	}
	return r
}

// must runs foothold and returns its standard output.
func (s *system) must(t *testing.T, args ...string) string {
	t.Helper()
	r := s.run(t.Context(), args...)
	if r.code != 0 {
		t.Fatalf("foothold %s: exit code %d\n%s%s", strings.Join(args, " "), r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// fetch gets a page from a place of the lab.
func (s *system) fetch(t *testing.T, from, url string) result {
	t.Helper()
	return s.run(t.Context(), "lab", "fetch", "--state", s.state, "--from", from, url)
}

// client talks to the lab's orchestrator.
func (s *system) client(t *testing.T) *client.Client {
	t.Helper()
	c, err := client.Find(s.context)
	if err != nil {
		t.Fatal(err)
	}
	api, err := client.Dial(c)
	if err != nil {
		t.Fatal(err)
	}
	return api
}

// template builds and registers the default template; what is slow of it is cached.
func (s *system) template(t *testing.T) {
	t.Helper()
	began := time.Now()
	s.must(t, "template", "build", "debian", "--cache", filepath.Join(s.build, "cache"),
		"--dir", filepath.Join(s.build, "templates"), "--guest", filepath.Join(s.bin, "foothold-guest"))
	t.Logf("template registered after %.1f s", time.Since(began).Seconds())
}

// buildProbe makes the prober's static binary.
func buildProbe(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "probe")
	cmd := exec.Command("go", "build", "-o", program, "foothold/e2e/probe")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the prober: %v\n%s", err, out)
	}
	return program
}
