package term

import (
	"fmt"
	"sync"
	"time"
)

// redraw is how often the line of the current step counts on, on a terminal.
const redraw = 200 * time.Millisecond

// Steps shows what is being done, one step after the other, each with its duration.
type Steps struct {
	out *Out

	mu      sync.Mutex
	name    string    // current step, "" for none; mu
	began   time.Time // mu
	stopped chan struct{}
	ended   sync.WaitGroup
}

// Steps begins a display on the stream; [Steps.Close] ends it.
func (o *Out) Steps() *Steps {
	s := &Steps{out: o, stopped: make(chan struct{})}
	if o.tty {
		s.ended.Go(s.count)
	}
	return s
}

// count redraws the current step until the display is closed.
func (s *Steps) count() {
	tick := time.NewTicker(redraw)
	defer tick.Stop()
	for {
		select {
		case <-s.stopped:
			return
		case <-tick.C:
			s.mu.Lock()
			s.draw()
			s.mu.Unlock()
		}
	}
}

// draw writes the current step over its line. mu is held.
func (s *Steps) draw() {
	if s.name == "" {
		return
	}
	fmt.Fprintf(s.out.w, "\r\x1b[K%s %-28s %7s", s.out.Paint(Busy, "…"), s.name, seconds(time.Since(s.began)))
}

// Begin starts a step that began at that time. A step that is still open just ends.
func (s *Steps) Begin(name string, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.name, s.began = name, at
	if s.out.tty {
		s.draw()
		return
	}
	s.out.Line("  %s ...", name)
}

// End writes how long a step took, whether it was the current one or has been missed.
func (s *Steps) End(name string, took time.Duration) { s.finish(name, took, Good, "✓") }

// Fail is End for a step that failed.
func (s *Steps) Fail(name string, took time.Duration) { s.finish(name, took, Bad, "✗") }

func (s *Steps) finish(name string, took time.Duration, tone Tone, mark string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.name == name {
		s.name = ""
	}
	if s.out.tty {
		fmt.Fprint(s.out.w, "\r\x1b[K")
	}
	s.out.Line("%s %-28s %7s", s.out.Paint(tone, mark), name, seconds(took))
	if s.out.tty {
		s.draw()
	}
}

// Note writes a line that is no step, above the current one.
func (s *Steps) Note(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.out.tty {
		fmt.Fprint(s.out.w, "\r\x1b[K")
	}
	s.out.Line("  %s", text)
	if s.out.tty {
		s.draw()
	}
}

// Close ends the display; the line of an open step goes.
func (s *Steps) Close() {
	close(s.stopped)
	s.ended.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.out.tty && s.name != "" {
		fmt.Fprint(s.out.w, "\r\x1b[K")
	}
	s.name = ""
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }
