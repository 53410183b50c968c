package tcglog

import (
	"bytes"
	"encoding/binary"
	"testing"
)

// variable is UEFI_VARIABLE_DATA with the sizes that it states.
func variable(vendor GUID, name string, chars, size uint64, data ...byte) []byte {
	out := binary.LittleEndian.AppendUint64(bytes.Clone(vendor[:]), chars)
	out = binary.LittleEndian.AppendUint64(out, size)
	wide := UTF16(name)
	return append(append(out, wide[:len(wide)-2]...), data...)
}

// read parses one event of register 7 with its own digest, or another's.
func read(t testing.TB, data, digestOf []byte) Event {
	t.Helper()
	l, err := Parse(write([]Bank{SHA256}, entry{pcr: 7, typ: IPL, data: data, sums: map[Bank][]byte{SHA256: (entry{data: digestOf}).sum(SHA256)}}))
	if err != nil {
		t.Fatal(err)
	}
	return l.Events[0]
}

func TestVariable(t *testing.T) {
	on := variable(GlobalVariable, "SecureBoot", 10, 1, 1)
	v, ok := read(t, on, on).Variable(SHA256)
	if !ok || v.Vendor != GlobalVariable || v.Name != "SecureBoot" || !bytes.Equal(v.Data, []byte{1}) {
		t.Errorf("%+v, %v", v, ok)
	}
	if _, ok := read(t, on, on).Variable(SHA384); ok {
		t.Error("a bank without a digest proved a variable")
	}
	// A signature list says how long its header is; whoever could shift what follows by it
	// would add to what is trusted. Lists are data of one digest here, with whatever is in them.
	list := append(make([]byte, 16), 0, 0, 1, 0, 0, 0, 0, 1, 48, 0, 0, 0) // type | size | header's size | signature's size
	db := variable(GUID{0xcb}, "db", 2, uint64(len(list)), list...)
	added := append(bytes.Clone(list), make([]byte, 48)...)
	if v, ok := read(t, db, db).Variable(SHA256); !ok || !bytes.Equal(v.Data, list) {
		t.Errorf("db: %+v, %v", v, ok)
	}
	for name, c := range map[string]struct{ data, digestOf []byte }{
		"a true digest with false data":      {on, variable(GlobalVariable, "SecureBoot", 10, 1, 0)},
		"a hash added to a database":         {variable(GUID{0xcb}, "db", 2, uint64(len(added)), added...), db},
		"the empty event":                    {nil, nil},
		"cut in its head":                    {on[:31], on[:31]},
		"a byte behind it":                   {append(bytes.Clone(on), 0), append(bytes.Clone(on), 0)},
		"a byte less":                        {on[:len(on)-1], on[:len(on)-1]},
		"a name that reaches into its data":  {variable(GlobalVariable, "SecureBoot", 11, 1, 1), variable(GlobalVariable, "SecureBoot", 11, 1, 1)},
		"a name of 2^63 characters":          {variable(GlobalVariable, "SecureBoot", 1<<63, 1, 1), variable(GlobalVariable, "SecureBoot", 1<<63, 1, 1)},
		"sizes whose sum overflows to right": {variable(GlobalVariable, "SecureBoot", 10, 1<<64-31, 1), variable(GlobalVariable, "SecureBoot", 10, 1<<64-31, 1)},
		"a gigabyte of data":                 {variable(GlobalVariable, "SecureBoot", 10, 1<<30, 1), variable(GlobalVariable, "SecureBoot", 10, 1<<30, 1)},
	} {
		if v, ok := read(t, c.data, c.digestOf).Variable(SHA256); ok {
			t.Errorf("%s: read as %+v", name, v)
		}
	}
}

func TestVersion(t *testing.T) {
	for _, c := range []struct {
		data []byte
		want string
	}{
		{UTF16("2.19.1"), "2.19.1"}, {UTF16("2.19.1")[:12], "2.19.1"}, {[]byte("2.19.1\x00"), "2.19.1"}, {[]byte("2.1\x00"), "2.1"}, {[]byte("U30 v2.80"), "U30 v2.80"},
		{nil, ""}, {[]byte{0, 0}, ""}, {bytes.Repeat([]byte("1"), maxDescription+1), ""}, {UTF16(string(bytes.Repeat([]byte("1"), maxDescription+1))), ""},
		{[]byte("2\x001\x00"), "21"}, {[]byte("2\x00\x00\x001\x00"), ""}, {[]byte{0xb2, 0x4d, 0x14, 0x9c, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, ""},
	} {
		if got, ok := read(t, c.data, c.data).Version(SHA256); got != c.want || ok != (c.want != "") {
			t.Errorf("%q is the version %q, %v, want %q", c.data, got, ok, c.want)
		}
	}
	if v, ok := read(t, []byte("9.9"), []byte("1.0")).Version(SHA256); ok {
		t.Errorf("false data are the version %q", v)
	}
}

// Whatever the bytes are: no panic, and a variable that was read is what they say, whole.
func FuzzVariable(f *testing.F) {
	f.Add(variable(GlobalVariable, "SecureBoot", 10, 1, 1))
	f.Add(variable(GUID{0xcb}, "db", 2, 4, 1, 2, 3, 4))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > MaxSize/2 {
			return
		}
		e := read(t, data, data)
		e.Version(SHA256)
		v, ok := e.Variable(SHA256)
		if !ok {
			return
		}
		if n := 32 + 2*binary.LittleEndian.Uint64(data[16:]); n+uint64(len(v.Data)) != uint64(len(data)) || !bytes.Equal(data[n:], v.Data) || !bytes.Equal(v.Vendor[:], data[:16]) {
			t.Fatalf("%x is read as %+v", data, v)
		}
	})
}
