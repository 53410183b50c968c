// Package swtpmtest gives tests a real TPM 2.0: one swtpm process each, in the state in
// which a TPM leaves its factory. Making one takes longer than most tests, so a TPM that
// a test is done with goes back, as it was made, to serve a later test of the same binary;
// two that are there at the same time are never the same.
package swtpmtest

import (
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"foothold/internal/foldertest"
	"foothold/internal/tpm"
	"foothold/internal/tpm/swtpm"
)

// TPM is a TPM with endorsement keys and certificates, powered on.
type TPM struct {
	Dir    string // swtpm's folder: see package swtpm
	Socket string
	t      testing.TB
	proc   *swtpm.Process
	stop   func() // cuts the power
}

// shelf holds the TPMs, as they were made, that no test has at the moment.
var shelf struct {
	sync.Mutex
	made []foldertest.Folder
}

// take takes a TPM from the shelf, or makes one.
func take(t testing.TB) foldertest.Folder {
	t.Helper()
	shelf.Lock()
	if n := len(shelf.made); n > 0 {
		defer shelf.Unlock()
		f := shelf.made[n-1]
		shelf.made = shelf.made[:n-1]
		return f
	}
	shelf.Unlock()
	f, err := foldertest.Make(func(dir string) error { return swtpm.Manufacture(t.Context(), dir) })
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func putBack(f foldertest.Folder) {
	shelf.Lock()
	defer shelf.Unlock()
	shelf.made = append(shelf.made, f)
}

// New gives the test a TPM, powered on, until its end.
func New(t testing.TB) *TPM {
	t.Helper()
	dir, err := os.MkdirTemp("", "swtpm-") // t.TempDir may be too long a path for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	v := &TPM{Dir: filepath.Join(dir, "tpm"), Socket: filepath.Join(dir, "socket"), t: t}
	f := take(t)
	t.Cleanup(func() { putBack(f) })
	f.Copy(t, v.Dir)
	v.start()
	t.Cleanup(func() { v.stop() })
	return v
}

// start powers it on. It would end with the thread that starts it, and a thread ends with
// any goroutine that had locked itself to it; so this one stays until the TPM is stopped.
func (v *TPM) start() {
	v.t.Helper()
	type started struct {
		proc *swtpm.Process
		err  error
	}
	up, stop := make(chan started), make(chan struct{})
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		proc, err := swtpm.StartControlled(v.t.Context(), v.Dir, v.Socket, v.Socket+"-control")
		up <- started{proc, err}
		<-stop
	}()
	s := <-up
	if s.err != nil {
		close(stop)
		v.t.Fatal(s.err)
	}
	v.proc = s.proc
	v.stop = func() {
		s.proc.Stop()
		close(stop)
	}
}

// Restart cuts the power and gives it back, as a reboot of the host does. Open
// connections break.
func (v *TPM) Restart() {
	v.t.Helper()
	v.stop()
	v.start()
}

// Launch is a dynamic launch: see [swtpm.Process.Launch].
func (v *TPM) Launch(code string) { v.driven(v.proc.Launch(v.t.Context(), code)) }

// Locality is the one that commands come from: see [swtpm.Process.Locality].
func (v *TPM) Locality(n int) { v.driven(v.proc.Locality(v.t.Context(), n)) }

func (v *TPM) driven(err error) {
	v.t.Helper()
	if err != nil {
		v.t.Fatal(err)
	}
}

// Roots is a PEM file of the authority that certified this TPM.
func (v *TPM) Roots() string { return filepath.Join(v.Dir, swtpm.RootFile) }

// Endorsement is the TPM's endorsement certificate with its chain, in DER.
func (v *TPM) Endorsement(dev *tpm.Device) (cert []byte, chain [][]byte) {
	v.t.Helper()
	cert, err := tpm.EndorsementCertificate(dev)
	if err != nil {
		v.t.Fatal(err)
	}
	if chain, err = swtpm.Chain(v.Dir); err != nil {
		v.t.Fatal(err)
	}
	return cert, chain
}

// Open opens the TPM until the test's end. Like a physical TPM it serves one opener
// at a time: close one before opening the next.
func (v *TPM) Open() *tpm.Device {
	v.t.Helper()
	dev, err := tpm.Open(v.Socket)
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { dev.Close() })
	return dev
}
