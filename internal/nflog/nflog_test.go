package nflog

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"testing"
	"time"

	"foothold/internal/nstest"
)

func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }

func TestLoggedPacketsArrive(t *testing.T) {
	nft, err := exec.LookPath("nft")
	if err != nil {
		nft = "/usr/sbin/nft"
	}
	cmd := exec.Command(nft, "-f", "-")
	cmd.Stdin = bytes.NewBufferString(`table inet t { chain o { type filter hook output priority 0; udp dport 999 log prefix "here it is" group 5 drop; }; }`)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	r, err := Open(5)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	got := make(chan Packet, 10)
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx, func(p Packet) { got <- p }) }()
	c, err := net.Dial("udp4", "127.0.0.1:999")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, _ = c.Write([]byte("x")) // dropped on the way out, so the write fails
	select {
	case p := <-got:
		if p.Prefix != "here it is" || p.Dst != netip.MustParseAddr("127.0.0.1") || p.DstPort != 999 || p.Proto != 17 || p.Out != 1 {
			t.Errorf("%+v", p)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("no packet")
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte{2, 0, 0, 5, 8, 0, 5, 0, 0, 0, 0, 1})
	f.Add(append([]byte{2, 0, 0, 5, 24, 0, 9, 0}, append([]byte{0x4f}, make([]byte, 19)...)...))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := parse(data)
		if err == nil && p.Src.IsValid() != p.Dst.IsValid() {
			t.Errorf("half an address pair: %+v", p)
		}
	})
}
