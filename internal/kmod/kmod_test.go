package kmod

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

const list = `builtin: ext4 af_packet
virtio /m/virtio.ko
virtio_ring /m/virtio_ring.ko virtio
virtio_pci /m/virtio_pci.ko virtio virtio_ring
dm_mod /m/dm-mod.ko
dm_crypt /m/dm-crypt.ko dm_mod
`

func parse(t *testing.T) (*Set, *[]string) {
	t.Helper()
	s, err := Parse(strings.NewReader(list))
	if err != nil {
		t.Fatal(err)
	}
	var inserted []string
	s.insert = func(path, _ string) error { inserted = append(inserted, path); return nil }
	return s, &inserted
}

func TestLoadTakesNeedsFirstAndOnce(t *testing.T) {
	s, inserted := parse(t)
	if err := s.Load("virtio-pci", "ext4"); err != nil {
		t.Fatal(err)
	}
	if err := s.LoadAll(); err != nil {
		t.Fatal(err)
	}
	want := []string{"/m/virtio.ko", "/m/virtio_ring.ko", "/m/virtio_pci.ko", "/m/dm-mod.ko", "/m/dm-crypt.ko"}
	if !slices.Equal(*inserted, want) {
		t.Errorf("inserted %v, want %v", *inserted, want)
	}
}

func TestModuleForAnotherCPUIsLeftOut(t *testing.T) {
	for _, has := range []bool{false, true} {
		s, err := Parse(strings.NewReader("crypto /m/crypto.ko\nsha /m/sha.ko crypto cpu=sha_ni\n"))
		if err != nil {
			t.Fatal(err)
		}
		var inserted []string
		s.insert = func(path, _ string) error { inserted = append(inserted, path); return nil }
		s.cpuHas = func(flag string) (bool, error) { return has && flag == "sha_ni", nil }
		if err := s.Load("sha"); err != nil {
			t.Fatal(err)
		}
		want := []string{"/m/crypto.ko", "/m/sha.ko"}
		if !has {
			want = nil
		}
		if !slices.Equal(inserted, want) {
			t.Errorf("CPU has the flag: %v; inserted %v", has, inserted)
		}
	}
}

func TestModuleIsLoadedWithItsParameters(t *testing.T) {
	s, err := Parse(strings.NewReader("crypto /m/crypto.ko\nbrd /m/brd.ko crypto with=rd_nr=1 with=rd_size=4\n"))
	if err != nil {
		t.Fatal(err)
	}
	var inserted []string
	s.insert = func(path, parameters string) error {
		inserted = append(inserted, path+" "+parameters)
		return nil
	}
	if err := s.LoadAll(); err != nil {
		t.Fatal(err)
	}
	if want := []string{"/m/crypto.ko ", "/m/brd.ko rd_nr=1 rd_size=4"}; !slices.Equal(inserted, want) {
		t.Errorf("inserted %q, want %q", inserted, want)
	}
}

func TestModuleOnDemandIsLeftOut(t *testing.T) {
	s, err := Parse(strings.NewReader("virtio /m/virtio.ko\nhelper /m/helper.ko load=on-demand\nconsole /m/console.ko virtio helper load=on-demand\n"))
	if err != nil {
		t.Fatal(err)
	}
	var inserted []string
	s.insert = func(path, _ string) error { inserted = append(inserted, path); return nil }
	if err := s.LoadAll(); err != nil || !slices.Equal(inserted, []string{"/m/virtio.ko"}) || !slices.Equal(s.Names(), []string{"virtio"}) {
		t.Errorf("loaded %v, named %v: %v", inserted, s.Names(), err)
	}
	if err := s.Load("console"); err != nil || !slices.Equal(inserted, []string{"/m/virtio.ko", "/m/helper.ko", "/m/console.ko"}) {
		t.Errorf("on demand: loaded %v: %v", inserted, err)
	}
}

func TestLoadStopsAtFailure(t *testing.T) {
	s, inserted := parse(t)
	s.insert = func(path, _ string) error {
		if path == "/m/dm-mod.ko" {
			return errors.New("refused")
		}
		*inserted = append(*inserted, path)
		return nil
	}
	if err := s.Load("dm_crypt"); err == nil || len(*inserted) != 0 {
		t.Errorf("dm_crypt loaded without dm_mod: %v, %v", err, *inserted)
	}
	if err := s.Load("nosuch"); err == nil {
		t.Error("a module that is not there loads")
	}
}

func TestFormatParsesBack(t *testing.T) {
	var b strings.Builder
	modules := []Module{{Name: "virtio", Path: "/m/virtio.ko"}, {Name: "dm_mod", Path: "/m/dm-mod.ko", Needs: []string{"virtio"}, CPU: "aes", With: []string{"count=1", "size=4"}},
		{Name: "console", Path: "/m/console.ko", OnDemand: true}}
	if err := Format(&b, modules, []string{"ext4"}); err != nil {
		t.Fatal(err)
	}
	s, err := Parse(strings.NewReader(b.String()))
	if err != nil {
		t.Fatal(err)
	}
	if !s.builtin["ext4"] || !slices.Equal(s.order, []string{"virtio", "dm_mod", "console"}) || !s.modules["console"].OnDemand || s.modules["virtio"].OnDemand || s.modules["dm_mod"].CPU != "aes" {
		t.Errorf("read back %+v", s)
	}
	if m := s.modules["dm_mod"]; !slices.Equal(m.Needs, []string{"virtio"}) || !slices.Equal(m.With, []string{"count=1", "size=4"}) {
		t.Errorf("read back %+v", m)
	}
}

func TestBadListsAreRefused(t *testing.T) {
	for _, text := range []string{"a\n", "a /a b\nb /b\n", "a /a\na /a\n", "a /a a\n", "a /a load=on-demand\nb /b a\n"} {
		if _, err := Parse(strings.NewReader(text)); err == nil {
			t.Errorf("%q is accepted", text)
		}
	}
}
