package resident

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"foothold/guest/pinned"
	"foothold/protocol/agentmsg"

	"github.com/klauspost/compress/zstd"
)

// Limits of a workload.
const (
	maxWorkload = 512 << 20 // bytes, in memory
	fetchLimit  = 5 * time.Minute
	maxEnv      = 64
	watchPace   = 2 * time.Second // how often a running workload is looked at
)

// States of a workload (agentmsg.Status).
const (
	fetching = "fetching"
	running  = "running"
	failed   = "failed"
	exited   = "exited"
)

var envForm = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*=[^\x00-\x08\x0a-\x1f\x7f]*$`)

// checkWorkload bounds what the orchestrator, or whoever holds its key, can ask for.
func checkWorkload(w *agentmsg.Workload) error {
	switch {
	case w.SHA256.IsZero() || w.Size < 1 || w.Size > maxWorkload:
		return errors.New("no good digest or size")
	case w.Kind != "executable" && w.Kind != "tar":
		return errors.New("unknown kind")
	case w.Kind == "tar" && !filepath.IsLocal(w.Entry):
		return errors.New("the entry point is not a path inside")
	case !w.Store.Addr().Is4() || w.Store.Port() == 0 || w.StoreName == "":
		return errors.New("no store")
	case w.Port < 0 || w.Port > 65535:
		return errors.New("no good port")
	case len(w.Env) > maxEnv || slices.ContainsFunc(w.Env, func(e string) bool { return len(e) > 4096 || !envForm.MatchString(e) }):
		return errors.New("no good environment")
	}
	return nil
}

// services starts and ends programs in the OS; systemd is the one.
type services interface {
	// Start runs a program as the workload, replacing an older one.
	Start(ctx context.Context, program string, w *agentmsg.Workload, address string) error
	// State is running, exited or failed, with a detail for the last two.
	State(ctx context.Context) (state, detail string)
	// Stop ends the workload, if there is one.
	Stop(ctx context.Context) error
}

// runner fetches, verifies and runs one workload at a time.
type runner struct {
	services services
	state    *State
	dir      string
	say      func(string, ...any) // milestones, for the console
	changed  chan struct{}        // capacity 1: a state has changed since the last message

	mu      sync.Mutex
	current *agentmsg.Workload // guarded by mu
	now     agentmsg.Status    // guarded by mu
	cancel  context.CancelFunc // of current; guarded by mu
	done    chan struct{}      // closed when current's goroutine has ended; guarded by mu
}

func newRunner(s services, state *State, dir string, say func(string, ...any)) *runner {
	return &runner{services: s, state: state, dir: dir, say: say, changed: make(chan struct{}, 1), cancel: func() {}}
}

// status is nil while there is no workload.
func (r *runner) status() *agentmsg.Status {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.current == nil {
		return nil
	}
	s := r.now
	return &s
}

// runs reports whether w is what the VM already runs, or tries to.
func (r *runner) runs(w *agentmsg.Workload) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.current
	return c != nil && c.SHA256 == w.SHA256 && c.Kind == w.Kind && c.Entry == w.Entry && c.Port == w.Port && slices.Equal(c.Env, w.Env)
}

// replace ends the current workload and begins another.
func (r *runner) replace(ctx context.Context, w *agentmsg.Workload) {
	r.end()
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	r.mu.Lock()
	r.current, r.cancel, r.done = w, cancel, done
	r.mu.Unlock()
	r.set(w, fetching, "")
	go func() {
		defer close(done)
		if err := r.run(ctx, w); err != nil && ctx.Err() == nil {
			r.set(w, failed, err.Error())
		}
	}()
}

// end stops the current workload and waits for that.
func (r *runner) end() {
	r.mu.Lock()
	cancel, done := r.cancel, r.done
	r.mu.Unlock()
	cancel()
	if done != nil {
		<-done
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		_ = r.services.Stop(ctx)
	}
}

func (r *runner) set(w *agentmsg.Workload, state, detail string) {
	if len(detail) > maxEventLen {
		detail = detail[:maxEventLen]
	}
	r.mu.Lock()
	news := r.now.State != state || r.now.SHA256 != w.SHA256
	r.now = agentmsg.Status{SHA256: w.SHA256, State: state, Detail: strings.ToValidUTF8(detail, "?")}
	r.mu.Unlock()
	if news {
		select {
		case r.changed <- struct{}{}:
		default:
		}
	}
}

// run fetches, starts and watches.
func (r *runner) run(ctx context.Context, w *agentmsg.Workload) error {
	program, err := r.fetch(ctx, w)
	if err != nil {
		return err
	}
	r.say("workload fetched, %d bytes", w.Size)
	if err := r.services.Start(ctx, program, w, r.state.Address.String()); err != nil {
		return err
	}
	r.say("workload started")
	r.set(w, running, "")
	tick := time.NewTicker(watchPace)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			state, detail := r.services.State(ctx)
			r.set(w, state, detail)
		}
	}
}

// fetch brings the object through the tunnel and returns the program's path. Nothing
// has its final name or an execute bit before size and digest are right.
func (r *runner) fetch(ctx context.Context, w *agentmsg.Workload) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchLimit)
	defer cancel()
	if err := os.RemoveAll(r.dir); err != nil {
		return "", fmt.Errorf("make room: %w", err)
	}
	if err := os.MkdirAll(r.dir, 0o755); err != nil {
		return "", fmt.Errorf("make room: %w", err)
	}
	if err := os.Chmod(r.dir, 0o755); err != nil { // whatever the umask
		return "", fmt.Errorf("make room: %w", err)
	}
	object := filepath.Join(r.dir, "object")
	f, err := os.OpenFile(object, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return "", fmt.Errorf("make room: %w", err)
	}
	defer f.Close()
	if err := r.download(ctx, w, f); err != nil {
		return "", err
	}
	if w.Kind == "executable" {
		program := filepath.Join(r.dir, "run")
		if err := f.Chmod(0o555); err != nil {
			return "", err
		}
		return program, os.Rename(object, program)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	tree := filepath.Join(r.dir, "tree")
	if err := unpack(f, tree); err != nil {
		return "", fmt.Errorf("unpack: %w", err)
	}
	return filepath.Join(tree, w.Entry), os.Remove(object)
}

// zstdCoding lets the store send its compressed copy: the tunnel is narrower than the
// processor.
var zstdCoding = pinned.Coding{Name: "zstd", Open: func(r io.Reader) (io.ReadCloser, error) {
	z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(8<<20))
	if err != nil {
		return nil, fmt.Errorf("unpack: %w", err)
	}
	return z.IOReadCloser(), nil
}}

func (r *runner) download(ctx context.Context, w *agentmsg.Workload, into io.Writer) error {
	link, err := pinned.Dial(ctx, r.state.store(w), r.state.certificate())
	if err != nil {
		return fmt.Errorf("fetch: %w", err)
	}
	defer link.Close()
	h := sha256.New()
	if err := link.GetCoded(ctx, "/v1/objects/"+w.SHA256.String(), zstdCoding, w.Size, io.MultiWriter(h, into)); err != nil {
		return fmt.Errorf("fetch: %w", err)
	}
	if subtle.ConstantTimeCompare(h.Sum(nil), w.SHA256[:]) != 1 {
		return errors.New("fetch: the object is not the one that was asked for")
	}
	return nil
}
