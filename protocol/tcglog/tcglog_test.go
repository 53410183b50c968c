package tcglog

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-attestation/attest"
)

// public gives the logs of real machines that go-attestation's authors test with.
func public(t testing.TB) map[string][]byte {
	t.Helper()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/google/go-attestation").Output()
	if err != nil {
		t.Fatalf("where is go-attestation: %v", err)
	}
	dir := filepath.Join(strings.TrimSpace(string(out)), "attest", "testdata")
	logs := map[string][]byte{}
	for _, name := range []string{
		"coreos_36_shielded_vm_no_secure_boot_eventlog", "crypto_agile_eventlog", "ebs_event_missing_eventlog",
		"option_rom_eventlog", "sb_cert_eventlog", "ubuntu_2104_shielded_vm_no_secure_boot_eventlog",
	} {
		if logs[name], err = os.ReadFile(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return logs
}

func TestPublicLogsReadAsTheirOwnLibraryReadsThem(t *testing.T) {
	for name, data := range public(t) {
		l, err := Parse(data)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		same(t, name, data, l)
		values, err := l.Replay(SHA256)
		if slices.Contains(l.Banks, SHA256) != (err == nil) || err == nil && len(values[0]) != sha256.Size {
			t.Errorf("%s: a log of %v replays to %v, %v", name, l.Banks, values, err)
		}
	}
}

// TestByRegister: each register has its events, all of them and no other's, in order; what is
// appended to one of the lists reaches no other.
func TestByRegister(t *testing.T) {
	for name, data := range public(t) {
		l, err := Parse(data)
		if err != nil {
			t.Fatal(err)
		}
		by, n := l.ByRegister(), 0
		for reg := range registers {
			var want []int
			for _, e := range l.Events {
				if e.PCR == reg {
					want = append(want, e.Number)
				}
			}
			_ = append(by[reg], Event{Number: -1})
			if got := numbers(by[reg]); !slices.Equal(got, want) {
				t.Errorf("%s: register %d has events %v, want %v", name, reg, got, want)
			}
			n += len(by[reg])
		}
		if n != len(l.Events) {
			t.Errorf("%s: %d events of %d", name, n, len(l.Events))
		}
	}
}

func numbers(events []Event) (list []int) {
	for _, e := range events {
		list = append(list, e.Number)
	}
	return list
}

// same compares with another library's reading of the log.
func same(t *testing.T, name string, data []byte, l *Log) {
	t.Helper()
	theirs, err := attest.ParseEventLog(data)
	if err != nil {
		t.Errorf("%s: another library refuses it: %v", name, err)
		return
	}
	i := 0
	for _, e := range theirs.Events(attest.HashSHA256) {
		if Type(e.Type) == NoAction {
			continue
		}
		if i >= len(l.Events) {
			t.Errorf("%s: another library finds more than %d events", name, i)
			return
		}
		ours := l.Events[i]
		if ours.PCR != e.Index || ours.Type != Type(e.Type) || !bytes.Equal(ours.Data, e.Data) || !bytes.Equal(ours.sha256, e.Digest) {
			t.Errorf("%s: event %d is %+v, another library says %+v", name, ours.Number, ours, e)
		}
		i++
	}
	if i != len(l.Events) {
		t.Errorf("%s: %d events, another library finds %d", name, len(l.Events), i)
	}
}

// entry is one event to be written; sums nil means digests of the data.
type entry struct {
	pcr  uint32
	typ  Type
	data []byte
	sums map[Bank][]byte
}

// header is a header event that names the banks.
func header(banks ...Bank) []byte {
	spec := append([]byte("Spec ID Event03\x00"), 0, 0, 0, 0, 0, 2, 0, 2)
	spec = binary.LittleEndian.AppendUint32(spec, uint32(len(banks)))
	for _, b := range banks {
		spec = binary.LittleEndian.AppendUint16(spec, uint16(b))
		spec = binary.LittleEndian.AppendUint16(spec, uint16(sizes[b]))
	}
	return legacy(0, NoAction, append(spec, 0))
}

func legacy(pcr uint32, typ Type, data []byte) []byte {
	out := binary.LittleEndian.AppendUint32(nil, pcr)
	out = binary.LittleEndian.AppendUint32(out, uint32(typ))
	out = append(out, make([]byte, 20)...)
	out = binary.LittleEndian.AppendUint32(out, uint32(len(data)))
	return append(out, data...)
}

func (e entry) bytes(banks ...Bank) []byte {
	out := binary.LittleEndian.AppendUint32(nil, e.pcr)
	out = binary.LittleEndian.AppendUint32(out, uint32(e.typ))
	out = binary.LittleEndian.AppendUint32(out, uint32(len(banks)))
	for _, b := range banks {
		out = binary.LittleEndian.AppendUint16(out, uint16(b))
		out = append(out, e.sum(b)...)
	}
	out = binary.LittleEndian.AppendUint32(out, uint32(len(e.data)))
	return append(out, e.data...)
}

func (e entry) sum(b Bank) []byte {
	if e.sums != nil {
		return e.sums[b]
	}
	switch b {
	case SHA256:
		s := sha256.Sum256(e.data)
		return s[:]
	case SHA384:
		s := sha512.Sum384(e.data)
		return s[:]
	}
	return make([]byte, sizes[b])
}

func write(banks []Bank, list ...entry) []byte {
	out := header(banks...)
	for _, e := range list {
		out = append(out, e.bytes(banks...)...)
	}
	return out
}

func startedFrom(locality byte) entry {
	return entry{typ: NoAction, data: append([]byte("StartupLocality\x00"), locality)}
}

var both = []Bank{SHA256, SHA384}

func TestBothBanksReplay(t *testing.T) {
	crtm := entry{pcr: 0, typ: CRTMVersion, data: []byte("firmware 1")}
	ipl := entry{pcr: 12, typ: IPL, data: []byte("quiet")}
	tboot := entry{pcr: 17, typ: 0x401, data: []byte("launched")}
	l, err := Parse(write([]Bank{sha1Bank, SHA256, SHA384}, startedFrom(3), crtm, ipl, tboot, ipl))
	if err != nil {
		t.Fatal(err)
	}
	for bank, size := range map[Bank]int{SHA256: 32, SHA384: 48} {
		values, err := l.Replay(bank)
		if err != nil {
			t.Fatal(err)
		}
		h, _ := bank.Hash()
		chain := func(first byte, sums ...[]byte) []byte {
			value := append(make([]byte, size-1), first)
			for _, s := range sums {
				f := h.New()
				f.Write(append(value, s...))
				value = f.Sum(nil)
			}
			return value
		}
		for pcr, want := range map[int][]byte{
			0:  chain(3, crtm.sum(bank)),
			12: chain(0, ipl.sum(bank), ipl.sum(bank)),
			17: chain(0, tboot.sum(bank)),
			18: chain(0), 22: chain(0), // the launch has reset them
		} {
			if !bytes.Equal(values[pcr], want) {
				t.Errorf("%v: register %d replays to %x, want %x", bank, pcr, values[pcr], want)
			}
		}
		if len(values) != 8 {
			t.Errorf("%v: %d registers", bank, len(values))
		}
		if !l.Events[0].Authentic(bank) {
			t.Errorf("%v: data with their own digest are not authentic", bank)
		}
	}
	early, err := Parse(write(both, ipl, entry{pcr: 18, typ: 0x401, data: []byte("x")}, tboot))
	if err != nil {
		t.Fatal(err)
	}
	if values, err := early.Replay(SHA256); err == nil {
		t.Errorf("register 18 was extended before there was a launch: %v", values)
	}
	if _, err := l.Replay(sha1Bank); err == nil {
		t.Error("SHA-1 registers were replayed")
	}
	if l.Events[0].Authentic(sha1Bank) {
		t.Error("SHA-1 proved data")
	}
}

// True digests beside data that say something else.
func TestDataAreProvedByTheirDigestAlone(t *testing.T) {
	e := entry{pcr: 7, typ: VariableConfig, data: []byte("SecureBoot is on")}
	lie := entry{pcr: 7, typ: e.typ, data: e.data, sums: map[Bank][]byte{SHA256: (entry{data: []byte("SecureBoot is off")}).sum(SHA256), SHA384: e.sum(SHA384)}}
	l, err := Parse(write(both, e, lie))
	if err != nil {
		t.Fatal(err)
	}
	if !l.Events[0].Authentic(SHA256) || l.Events[1].Authentic(SHA256) {
		t.Error("false data passed for true ones, or true for false")
	}
	if !l.Events[1].Authentic(SHA384) {
		t.Error("one bank's lie counts in another")
	}
}

func TestEveryEventMustHaveADigestOfTheBank(t *testing.T) {
	log := append(header(both...), entry{pcr: 1, typ: Separator, data: make([]byte, 4)}.bytes(SHA384)...)
	l, err := Parse(log)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Replay(SHA256); err == nil {
		t.Error("an event without a digest was passed over")
	}
	if l.Events[0].Authentic(SHA256) {
		t.Error("no digest proved data")
	}
	l, err = Parse(legacy(2, Separator, make([]byte, 4)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Replay(SHA256); err == nil || len(l.Events) != 1 {
		t.Error("a log of SHA-1 digests was replayed")
	}
}

func TestMalformedLogsAreRefused(t *testing.T) {
	good := entry{pcr: 4, typ: Separator, data: make([]byte, 4)}
	whole := write(both, good)
	huge := func(log []byte) []byte { // the last event's size field, a gigabyte
		log = bytes.Clone(log)
		binary.LittleEndian.PutUint32(log[len(log)-8:], 1<<30)
		return log
	}
	double := append(header(both...), entry{pcr: 4, typ: Separator}.bytes(SHA256, SHA256)...)
	foreign := append(header(SHA256), good.bytes(SHA384)...)
	wrongSize := header(SHA256)
	wrongSize[32+28+2] = 20 // 32 bytes of the event, 24 + 4 of the specification, the algorithm
	for name, log := range map[string][]byte{
		"empty":                                nil,
		"cut in the header":                    whole[:40],
		"cut in a digest":                      whole[:len(whole)-40],
		"cut in the data":                      whole[:len(whole)-1],
		"one byte more":                        append(bytes.Clone(whole), 0),
		"a gigabyte of data":                   huge(whole),
		"two digests of a bank":                double,
		"a digest that the header lacks":       foreign,
		"a bank twice in the header":           header(SHA256, SHA256),
		"no bank in the header":                header(),
		"another size for SHA-256":             wrongSize,
		"a register that does not exist":       write(both, entry{pcr: 24, typ: Separator}),
		"a register with the highest number":   write(both, entry{pcr: 1<<32 - 1, typ: Separator}),
		"startup locality after an event":      write(both, entry{pcr: 0, typ: Separator}, startedFrom(3)),
		"startup locality twice":               write(both, startedFrom(0), startedFrom(3)),
		"startup locality 2":                   write(both, startedFrom(2)),
		"startup locality of another register": write(both, entry{pcr: 1, typ: NoAction, data: startedFrom(3).data}),
		"startup locality with more bytes":     write(both, entry{typ: NoAction, data: append(startedFrom(3).data, 0)}),
		"too many events":                      append(header(SHA256), bytes.Repeat(entry{pcr: 1}.bytes(SHA256), MaxEvents+1)...),
		"too many bytes":                       append(bytes.Clone(whole), make([]byte, MaxSize)...),
	} {
		if l, err := Parse(log); err == nil {
			t.Errorf("%s: read as %+v", name, l)
		}
	}
	if _, err := Parse(append(header(SHA256), bytes.Repeat(entry{pcr: 1}.bytes(SHA256), MaxEvents)...)); err != nil {
		t.Errorf("as many events as there may be: %v", err)
	}
}

// Whatever the bytes are: no panic, and nothing else than another library reads.
func FuzzParse(f *testing.F) {
	for _, log := range public(f) {
		f.Add(log)
	}
	f.Add(write([]Bank{sha1Bank, SHA256, SHA384}, startedFrom(3), entry{pcr: 7, typ: Separator, data: make([]byte, 4)}))
	f.Add(legacy(0, Separator, make([]byte, 4)))
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := Parse(data)
		if err != nil {
			return
		}
		if len(l.Events) > MaxEvents {
			t.Fatalf("%d events", len(l.Events))
		}
		for _, e := range l.Events {
			if d := e.Describe(); len([]rune(d)) > 2*maxDescription {
				t.Fatalf("described in %d characters", len([]rune(d)))
			}
		}
		for _, b := range both {
			values, err := l.Replay(b)
			for pcr, v := range values {
				if pcr < 0 || pcr >= registers || len(v) != sizes[b] || err != nil {
					t.Fatalf("register %d holds %x, %v", pcr, v, err)
				}
			}
		}
		if theirs, err := attest.ParseEventLog(data); err == nil && len(theirs.Algs) == len(l.Banks) {
			same(t, "fuzzed", data, l)
		}
	})
}
