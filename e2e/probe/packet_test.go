package main

import (
	"encoding/binary"
	"net/netip"
	"testing"
)

func TestPacketsAreWellFormedAndIdentifyThemselves(t *testing.T) {
	for _, proto := range []string{"tcp", "udp", "icmp"} {
		p := Probe{Proto: proto, Src: netip.MustParseAddr("10.82.0.10"), Dst: netip.MustParseAddr("10.81.0.10"), Sport: 40000, Dport: 443}
		packet, err := p.packet(0x00070003)
		if err != nil {
			t.Fatal(err)
		}
		if checksum(packet[:20], 0) != 0 {
			t.Errorf("%s: header checksum", proto)
		}
		body, sum := packet[20:], uint32(0)
		if proto != "icmp" {
			sum = pseudo(p.Src.As4(), p.Dst.As4(), protoNumbers[proto], len(body))
		}
		if checksum(body, sum) != 0 {
			t.Errorf("%s: checksum", proto)
		}
		if int(binary.BigEndian.Uint16(packet[2:])) != len(packet) {
			t.Errorf("%s: length", proto)
		}
		if mark, err := identify(packet); err != nil || mark != 0x00070003 {
			t.Errorf("%s: mark %x, %v", proto, mark, err)
		}
		for cut := range packet {
			if _, err := identify(packet[:cut]); err == nil && proto != "icmp" && cut < 40 {
				t.Errorf("%s cut to %d bytes is taken for a probe", proto, cut)
			}
		}
	}
}

func TestOrdinaryPacketsAreNotProbes(t *testing.T) {
	p := Probe{Proto: "tcp", Src: netip.MustParseAddr("10.0.0.1"), Dst: netip.MustParseAddr("10.0.0.2"), Dport: 22}
	packet, err := p.packet(1)
	if err != nil {
		t.Fatal(err)
	}
	packet[20+13] = 0x12 // a SYN-ACK
	if _, err := identify(packet); err == nil {
		t.Error("a SYN-ACK is taken for a probe")
	}
	if _, err := (Probe{Proto: "gre"}).packet(1); err == nil {
		t.Error("an unknown protocol is made")
	}
}

func FuzzIdentify(f *testing.F) {
	f.Add([]byte{0x45})
	f.Fuzz(func(t *testing.T, data []byte) { identify(data) })
}
