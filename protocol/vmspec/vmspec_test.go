package vmspec

import (
	"net/netip"
	"reflect"
	"testing"

	"foothold/protocol/digest"
)

func valid() Spec {
	return Spec{
		Reservation: "0b7e0a52-6f1c-4f0e-9d6d-0a5d4b9d2f11", Start: 1, Tenant: "bank", Name: "web-1", VCPUs: 1, MemoryMiB: 1024,
		Network: Network{MAC: "02:00:0a:52:00:0a", Address: netip.MustParsePrefix("10.82.0.10/24"), Gateway: netip.MustParseAddr("10.82.0.1"), MTU: 1500},
		Boot: Boot{URL: "https://10.81.0.10:443", ServerName: "boot.foothold.internal", CA: []byte{1},
			ManifestKey: make([]byte, 32), ComponentKey: make([]byte, 32)},
		TokenDigest: digest.Of([]byte("t")), Template: digest.Of([]byte("i")),
		Volume: Volume{ID: "5f0e0b52-6f1c-4f0e-9d6d-0a5d4b9d2f12", SizeMiB: 1024},
	}
}

func TestValidate(t *testing.T) {
	s := valid()
	if err := s.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Spec){
		"reservation":      func(s *Spec) { s.Reservation = "x" },
		"upper-case uuid":  func(s *Spec) { s.Reservation = "0B7E0A52-6F1C-4F0E-9D6D-0A5D4B9D2F11" },
		"start":            func(s *Spec) { s.Start = 0 },
		"tenant":           func(s *Spec) { s.Tenant = "Bank" },
		"name with slash":  func(s *Spec) { s.Name = "a/b" },
		"name with comma":  func(s *Spec) { s.Name = "a,b" },
		"no vcpu":          func(s *Spec) { s.VCPUs = 0 },
		"memory":           func(s *Spec) { s.MemoryMiB = 1 },
		"multicast mac":    func(s *Spec) { s.Network.MAC = "03:00:0a:52:00:0a" },
		"global mac":       func(s *Spec) { s.Network.MAC = "00:00:0a:52:00:0a" },
		"mac with options": func(s *Spec) { s.Network.MAC = "02:00:0a:52:00:0a,x=y" },
		"ipv6":             func(s *Spec) { s.Network.Address = netip.MustParsePrefix("fd00::1/64") },
		"foreign gateway":  func(s *Spec) { s.Network.Gateway = netip.MustParseAddr("10.83.0.1") },
		"self as gateway":  func(s *Spec) { s.Network.Gateway = s.Network.Address.Addr() },
		"mtu":              func(s *Spec) { s.Network.MTU = 100 },
		"http":             func(s *Spec) { s.Boot.URL = "http://10.81.0.10" },
		"url with path":    func(s *Spec) { s.Boot.URL += "/x" },
		"url with user":    func(s *Spec) { s.Boot.URL = "https://u@10.81.0.10" },
		"no ca":            func(s *Spec) { s.Boot.CA = nil },
		"short key":        func(s *Spec) { s.Boot.ManifestKey = make([]byte, 31) },
		"no component key": func(s *Spec) { s.Boot.ComponentKey = nil },
		"no token":         func(s *Spec) { s.TokenDigest = digest.SHA256{} },
		"no template":      func(s *Spec) { s.Template = digest.SHA256{} },
		"volume":           func(s *Spec) { s.Volume.ID = "../x" },
		"volume size":      func(s *Spec) { s.Volume.SizeMiB = 0 },
	} {
		s := valid()
		change(&s)
		if s.Validate() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// Every field counts in the digest: change each leaf in turn by reflection, so that a
// field added later and forgotten in Digest fails here.
func TestDigestCoversEveryField(t *testing.T) {
	base := valid()
	want := base.Digest()
	var walk func(path string, get func(*Spec) reflect.Value)
	leaves := 0
	walk = func(path string, get func(*Spec) reflect.Value) {
		s := valid()
		v := get(&s)
		switch val := v.Interface().(type) {
		case netip.Prefix:
			v.Set(reflect.ValueOf(netip.MustParsePrefix("10.82.0.11/24")))
		case netip.Addr:
			v.Set(reflect.ValueOf(val.Next()))
		case digest.SHA256:
			val[0] ^= 1
			v.Set(reflect.ValueOf(val))
		case []byte:
			v.Set(reflect.ValueOf(append([]byte{9}, val...)))
		case string:
			v.SetString(val + "x")
		case int:
			v.SetInt(int64(val) + 1)
		case bool:
			v.SetBool(!val)
		default:
			if v.Kind() != reflect.Struct {
				t.Fatalf("%s: a field of kind %s needs a case here", path, v.Kind())
			}
			for i := range v.NumField() {
				walk(path+"."+v.Type().Field(i).Name, func(s *Spec) reflect.Value { return get(s).Field(i) })
			}
			return
		}
		leaves++
		if s.Digest() == want {
			t.Errorf("%s does not count in the digest", path)
		}
	}
	walk("Spec", func(s *Spec) reflect.Value { return reflect.ValueOf(s).Elem() })
	if leaves < 18 {
		t.Fatalf("only %d leaves walked", leaves)
	}
}

func TestMeasurementsDependOnEachPart(t *testing.T) {
	fw := Firmware{digest.Of([]byte("b")), digest.Of([]byte("k")), digest.Of([]byte("i")), "quiet"}
	events := Measurements(fw, digest.Of([]byte("s")))
	seen := map[digest.SHA256]bool{}
	for _, e := range events {
		if seen[e.Digest] {
			t.Errorf("%s: the same digest twice", e.Name)
		}
		seen[e.Digest] = true
	}
	if len(events) != 5 {
		t.Fatalf("%d events", len(events))
	}
}
