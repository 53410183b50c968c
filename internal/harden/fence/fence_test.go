package fence_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"foothold/internal/harden/fence"
)

func TestEnclose(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	program := path("probe")
	cmd := exec.Command("go", "build", "-o", program, "./testdata/probe")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the probe: %v\n%s", err, out)
	}
	for _, name := range []string{"given", "other", "folder/given", "state/program"} {
		if err := os.MkdirAll(filepath.Dir(path(name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path(name), []byte("#!/bin/sh\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	files := fence.Files{Own: []string{path("state"), path("new")}, Read: []string{path("given"), path("folder"), path("absent")}, Devices: []string{"/dev/null"}}
	var args, want []string
	for _, c := range []struct{ wish, want string }{
		{"read given", "yes"}, {"write given", "no"}, {"run given", "no"},
		{"read folder/given", "yes"}, {"write folder/more", "no"},
		{"read other", "no"}, {"write other", "no"}, {"read absent", "no"},
		{"write state/file", "yes"}, {"read state/file", "yes"}, {"run state/program", "no"},
		{"write new/file", "yes"},
		{"write /dev/null", "yes"}, {"read /dev/zero", "no"}, {"read /etc/passwd", "no"}, {"run /bin/true", "no"}, {"read /proc/self/status", "no"},
	} {
		what, name, _ := strings.Cut(c.wish, " ")
		if !filepath.IsAbs(name) {
			name = path(name)
		}
		args, want = append(args, what+" "+name), append(want, c.want)
	}
	conf, err := json.Marshal(files)
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(program, append([]string{string(conf)}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	said := strings.Fields(string(out))
	if said[0] == "0" {
		t.Fatal("this kernel has no Landlock: add landlock to lsm= on its command line, or use Debian 12's or a later one")
	}
	t.Logf("Landlock %s", said[0])
	if !slices.Equal(said[1:], want) {
		for i, w := range want {
			if said[1+i] != w {
				t.Errorf("%s: %s, want %s", args[i], said[1+i], w)
			}
		}
	}
}
