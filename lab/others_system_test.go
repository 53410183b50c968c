//go:build system

package lab_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/lab/control"

	"golang.org/x/sys/unix"
)

// public are the kinds of file in a lab's folders that hold nothing of anybody's:
// certificates, what is published signed or measured, ciphertext that the provider gets as it is.
var public = []string{
	"*/*.crt", "*/*/*.crt", "*/*/*/*.crt", "tenant/inventory.json", "tenant/platform.json", "tenant/tpm-roots.pem", "provider/*.json", "provider/release/*.json", "tenant/templates/*", "tenant/templates/*/*", "tenant/orchestrator/authorities",
	"provider/authority/*", "provider/authority/*/*",
	"provider/tpm/*", "provider/tpm/*/*", // swtpm's, which stands for a chip
}

// testModes looks at every file that the lab's daemons have made: others have no right to it,
// whatever the folders above it say.
func (l *testLab) testModes(t *testing.T) {
	seen := map[string]int{}
	err := filepath.WalkDir(l.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(l.dir, path)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		top, _, _ := strings.Cut(name, "/")
		seen[top]++
		if filepath.Ext(name) != ".key" && slices.ContainsFunc(public, func(p string) bool { ok, _ := filepath.Match(p, name); return ok }) {
			if info.Mode().Perm()&0o022 != 0 {
				t.Errorf("others write %s: %v", name, info.Mode())
			}
			return nil
		}
		if info.Mode().Perm()&0o077 != 0 && info.Mode().Type() != fs.ModeSymlink {
			t.Errorf("others have a right to %s: %v", name, info.Mode())
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, top := range []string{"tenant", "dmz", "provider", "logs", "run"} {
		if seen[top] < 2 {
			t.Errorf("%d files seen in %s", seen[top], top)
		}
	}
}

// testStranger calls the lab's socket as another user, for whom its modes were opened: the
// supervisor sees who calls, and gives no answer.
func (l *testLab) testStranger(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can call as another user: sudo make system")
	}
	run := filepath.Join(l.dir, "run")
	for path, mode := range map[string]os.FileMode{run: 0o755, filepath.Join(run, control.SocketFile): 0o666} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		defer os.Chmod(path, info.Mode())
	}
	const nobody = 65534
	if n, err := ask(run, 0); err != nil || n == 0 {
		t.Fatalf("its own user gets %d bytes, %v: the call shows nothing", n, err)
	}
	if n, err := ask(run, nobody); err != nil || n != 0 {
		t.Errorf("user %d gets %d bytes, %v", nobody, n, err)
	}
}

// ask asks for the lab's status from a thread that is another user's, and returns the
// length of the answer, 0 for none.
func ask(run string, uid uintptr) (n int, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		n, err = askHere(run, uid)
	}()
	<-done
	return n, err
}

// askHere changes the calling thread for good. The socket is reached through the thread's
// working directory: the folders above are closed to others.
func askHere(run string, uid uintptr) (int, error) {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return 0, err
	}
	if err := unix.Chdir(run); err != nil {
		return 0, err
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uid, uid, uid); errno != 0 { // this thread alone
		return 0, errno
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: control.SocketFile}); err != nil {
		return 0, err
	}
	limit := unix.NsecToTimeval((10 * time.Second).Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit); err != nil {
		return 0, err
	}
	// One that is sent away before it has asked sees a closed socket.
	if _, err := unix.Write(fd, []byte(`{"op":"`+control.OpStatus+`"}`)); err != nil && err != unix.EPIPE {
		return 0, err
	}
	n, err := unix.Read(fd, make([]byte, control.MaxMessage))
	if err == unix.ECONNRESET {
		return 0, nil
	}
	return n, err
}
