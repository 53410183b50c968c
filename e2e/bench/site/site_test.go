package site

import (
	"bytes"
	"testing"

	"foothold/protocol/bootmsg"
)

func TestTicksOf(t *testing.T) {
	stat := "17 (a) b (c) S 1 17 17 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 1 0 5 6 7"
	if got, err := ticksOf(stat); err != nil || got != 300 {
		t.Errorf("%d, %v; want 300", got, err)
	}
	for _, bad := range []string{"", "17 (x) S 1 17", "17 (x) S 1 17 17 0 -1 4194560 100 0 0 0 y 50 0"} {
		if got, err := ticksOf(bad); err == nil {
			t.Errorf("%q: %d", bad, got)
		}
	}
}

// TestVMsBoot is the whole conversation at the real daemons, and that a token is spent.
func TestVMsBoot(t *testing.T) {
	s, err := Open(t.Context(), Options{Dir: t.TempDir(), Hosts: 2, Kernel: bytes.Repeat([]byte("kernel"), 10000), Initramfs: bytes.Repeat([]byte("initramfs"), 10000), Lease: testLease})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	vms, err := s.Reserve(t.Context(), 3)
	if err != nil {
		t.Fatal(err)
	}
	for _, vm := range vms {
		l, err := s.Dial(t.Context(), vm)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := l.Fetch(bootmsg.PathKernel); err == nil {
			t.Error("a component without a grant")
		}
		if l, err = s.Dial(t.Context(), vm); err != nil {
			t.Fatal(err)
		}
		if err := l.Open(); err != nil {
			t.Fatal(err)
		}
		if err := l.Attest(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		if n, err := l.Fetch(bootmsg.PathInitramfs); err != nil || n != 90000 {
			t.Fatalf("initramfs: %d bytes, %v", n, err)
		}
		if err := l.Finish(bootmsg.PathInitramfs); err != nil {
			t.Fatal(err)
		}
		if l, err = s.Dial(t.Context(), vm); err != nil {
			t.Fatal(err)
		}
		if err := l.Open(); err == nil {
			t.Error("a token is spent twice")
		}
	}
	if spent, err := s.TPMTime(); err != nil || spent <= 0 {
		t.Errorf("the TPMs took %v, %v", spent, err)
	}
}
