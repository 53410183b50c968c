package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"foothold/e2e/bench/site"
	"foothold/protocol/bootmsg"
)

const (
	deliveryRounds = 9
	deliverySize   = 128 << 20 // bytes; more than a real initramfs, so that the clock's noise is small
)

// delivery compares the boot server with nginx: the same bytes in files, the same kind of
// certificate, the same cipher, the same reader, in turns. What is timed is the request for
// the component and its answer; each connection is fresh and its handshake done before.
func delivery(ctx context.Context, o options) (results []Result, err error) {
	data := make([]byte, deliverySize)
	rand.Read(data)
	s, err := site.Open(ctx, site.Options{Dir: filepath.Join(o.work, "delivery"), Hosts: 1, Kernel: data[:4096], Initramfs: data})
	if err != nil {
		return nil, err
	}
	defer func() {
		if cerr := s.Close(); err == nil {
			err = cerr
		}
	}()
	peer, err := startNginx(ctx, o, s, data)
	if err != nil {
		return nil, err
	}
	defer peer.stop()
	vms, err := s.Reserve(ctx, deliveryRounds+1)
	if err != nil {
		return nil, err
	}
	var ours, theirs []float64
	for i, vm := range vms {
		own, suite, err := deliverOurs(ctx, s, vm)
		if err != nil {
			return nil, fmt.Errorf("boot server: %w", err)
		}
		other, peerSuite, err := peer.deliver(ctx, s)
		if err != nil {
			return nil, fmt.Errorf("nginx: %w", err)
		}
		if suite != peerSuite {
			return nil, fmt.Errorf("the boot server takes %s and nginx %s: they are not comparable", tls.CipherSuiteName(suite), tls.CipherSuiteName(peerSuite))
		}
		if i > 0 { // the first time, both read from the disk
			ours, theirs = append(ours, own), append(theirs, other)
		}
	}
	r := Result{Name: "component delivery", Value: median(ours), Unit: "MB/s"}.against("nginx", median(theirs))
	return []Result{r, atLeast("component delivery, times nginx", r.Ratio, "times", aimDeliver)}, nil
}

// deliverOurs boots a VM and times its initramfs, in MB/s.
func deliverOurs(ctx context.Context, s *site.Site, vm *site.VM) (rate float64, suite uint16, err error) {
	l, err := s.Dial(ctx, vm)
	if err != nil {
		return 0, 0, err
	}
	defer l.Close()
	if err := l.Open(); err != nil {
		return 0, 0, err
	}
	if err := l.Attest(ctx, s); err != nil {
		return 0, 0, err
	}
	began := time.Now()
	n, err := l.Fetch(bootmsg.PathInitramfs)
	took := since(began)
	if err != nil {
		return 0, 0, err
	}
	if n != deliverySize {
		return 0, 0, fmt.Errorf("%d bytes came, want %d", n, deliverySize)
	}
	return float64(n) / took / 1e6, l.Cipher(), l.Finish(bootmsg.PathInitramfs)
}

// deliver times nginx in the same way.
func (p *nginx) deliver(ctx context.Context, s *site.Site) (rate float64, suite uint16, err error) {
	d := tls.Dialer{NetDialer: &net.Dialer{}, Config: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: s.Roots(), ServerName: site.ServerName}}
	c, err := d.DialContext(ctx, "tcp", p.address)
	if err != nil {
		return 0, 0, err
	}
	defer c.Close()
	in := bufio.NewReader(c)
	began := time.Now()
	n, err := site.Get(c, in, bootmsg.PathInitramfs)
	took := since(began)
	if err != nil {
		return 0, 0, err
	}
	if n != deliverySize {
		return 0, 0, fmt.Errorf("%d bytes came, want %d", n, deliverySize)
	}
	return float64(n) / took / 1e6, c.(*tls.Conn).ConnectionState().CipherSuite, nil
}

// serveFolder lays the bytes out as nginx finds them.
func serveFolder(dir string, data []byte) error {
	file := filepath.Join(dir, bootmsg.PathInitramfs)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, data, 0o644)
}
