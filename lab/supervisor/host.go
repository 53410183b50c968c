package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"foothold/internal/tpm"
	"foothold/internal/tpm/swtpm"
	"foothold/lab/control"
	"foothold/lab/ground"
	"foothold/provider/measure"
)

// powerOn keeps the host on until ctx ends. One pass of the loop is one boot of the
// host: power for the TPM, measurements by the launcher, the agent. The agent may be
// started again within a boot, which extends nothing; the end of the TPM ends the boot.
func (s *supervisor) powerOn(ctx context.Context, agent *daemon, booted chan<- error) {
	for pause := firstPause; ctx.Err() == nil; pause = min(2*pause, longPause) {
		err := s.bootHost(ctx, agent, booted)
		if ctx.Err() != nil {
			return
		}
		booted = nil // only the first boot is waited for
		slog.Warn("the host lost its power", "error", err)
		agent.set(func(d *control.Daemon) { d.State, d.PID, d.LastExit = control.Waiting, 0, "the host lost its power" })
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// bootHost is one boot of the host, until its TPM or ctx ends.
func (s *supervisor) bootHost(ctx context.Context, agent *daemon, booted chan<- error) error {
	// The TPM's power ends with this thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	on, off := context.WithCancel(ctx)
	defer off()
	proc, err := s.launch(on)
	if booted != nil {
		booted <- err
	}
	if err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		agent.run(on)
	}()
	select {
	case <-proc.Done():
		err = errors.New("the TPM ended")
	case <-ctx.Done():
		err = ctx.Err()
	}
	off()
	<-ended // the agent ends before its TPM loses power
	proc.Stop()
	return err
}

// launch stands for the host's firmware and measured boot: it powers the TPM on,
// loads the platform's files from the installed release, and measures them in order
// before any of them runs.
func (s *supervisor) launch(ctx context.Context) (*swtpm.Process, error) {
	if err := load(ground.ReleaseDir(s.state)); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(ground.TPMSocket), 0o700); err != nil {
		return nil, fmt.Errorf("make TPM socket folder: %w", err)
	}
	proc, err := swtpm.Start(ctx, s.state.Provider("tpm"), ground.TPMSocket)
	if err != nil {
		return nil, err
	}
	if err := s.measure(); err != nil {
		proc.Stop()
		return nil, err
	}
	return proc, nil
}

// load copies the release into memory, where nobody changes it between its
// measurement and its use: a file system of the lab's own, read-only from here on.
func load(release string) error {
	if err := os.MkdirAll(ground.RunDir, 0o700); err != nil {
		return fmt.Errorf("load platform: %w", err)
	}
	if err := unix.Unmount(ground.RunDir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("unload the last boot's platform: %w", err)
	}
	if err := unix.Mount("platform", ground.RunDir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0700,size=512m"); err != nil {
		return fmt.Errorf("load platform: %w", err)
	}
	// A child that is forked meanwhile would hold the files open for writing until it
	// becomes its program, and the file system could not be made read-only.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	for _, name := range ground.PlatformFiles() {
		if err := copyFile(filepath.Join(release, name), filepath.Join(ground.RunDir, name)); err != nil {
			return fmt.Errorf("load platform: %w", err)
		}
	}
	if err := unix.Mount("", ground.RunDir, "", unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, "mode=0700,size=512m"); err != nil {
		return fmt.Errorf("protect platform: %w", err)
	}
	return nil
}

func copyFile(from, to string) error {
	r, err := os.Open(from)
	if err != nil {
		return err
	}
	defer r.Close()
	w, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o500)
	if err != nil {
		return err
	}
	if _, err := io.Copy(w, r); err != nil {
		w.Close()
		return err
	}
	return w.Close()
}

// measure extends the TPM with the loaded files and writes the log.
func (s *supervisor) measure() error {
	dev, err := tpm.Open(ground.TPMSocket)
	if err != nil {
		return err
	}
	defer dev.Close() // the agent's broker is the next to open it
	var files []measure.File
	defer func() {
		for _, f := range files {
			f.File.Close()
		}
	}()
	platform, err := ground.MeasuredFiles(ground.ReleaseDir(s.state))
	if err != nil {
		return err
	}
	for _, p := range platform {
		f, err := os.Open(p.Place())
		if err != nil {
			return fmt.Errorf("measure platform: %w", err)
		}
		files = append(files, measure.File{Name: p.Name, File: f})
	}
	events, err := measure.Launch(dev, files)
	if err != nil {
		return err
	}
	return measure.WriteLog(s.state.Provider("measurements.json"), events)
}
