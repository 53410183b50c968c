package client

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestServerAddress(t *testing.T) {
	for server, want := range map[string]string{
		"127.0.0.1:8443":         "127.0.0.1:8443",
		"https://localhost:8443": "localhost:8443",
		"https://localhost:1/":   "localhost:1",
		"http://localhost:8443":  "",
		"https://u:p@h:1":        "",
		"https://h:1/path":       "",
		"localhost":              "",
		":8443":                  "",
		"":                       "",
	} {
		got, err := Context{Server: server}.address()
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", server, got, err)
		}
	}
}

func TestWriteThenFindKeepsPathsRelativeToTheFile(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "context.yaml")
	in := Context{Name: "lab", Server: "127.0.0.1:1", CA: "ca.pem", Cert: "/abs/cert.pem", Key: "key.pem"}
	if err := Write(file, in); err != nil {
		t.Fatal(err)
	}
	got, err := Find(file)
	if err != nil {
		t.Fatal(err)
	}
	if got.CA != filepath.Join(dir, "ca.pem") || got.Cert != "/abs/cert.pem" || got.ComponentKey != "" || got.File != file {
		t.Errorf("found %+v", got)
	}
	info, err := os.Stat(file)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

func TestForgetLeavesAnotherLabsContext(t *testing.T) {
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	dir := t.TempDir()
	one, two := filepath.Join(dir, "one.yaml"), filepath.Join(dir, "two.yaml")
	for _, f := range []string{one, two} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := Remember(two); err != nil {
		t.Fatal(err)
	}
	if err := Forget(one); err != nil {
		t.Fatal(err)
	}
	if got, err := Remembered(); err != nil || got != two {
		t.Fatalf("remembered %q, %v", got, err)
	}
	if err := Forget(two); err != nil {
		t.Fatal(err)
	}
	if got, err := Remembered(); err == nil {
		t.Fatalf("still remembers %q", got)
	}
}

func TestContextErrorsNameFileAndField(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(file, []byte("server: 127.0.0.1:1\nca: a\ncert: b\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Find(file)
	if err == nil || !strings.Contains(err.Error(), file) || !strings.Contains(err.Error(), "key is missing") {
		t.Errorf("error %v", err)
	}
	if err := os.WriteFile(file, []byte("server: h:1\nca: a\ncert: b\nkey: c\nvolume: none\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Find(file); err == nil || !strings.Contains(err.Error(), "authenticated nor encrypted") {
		t.Errorf("another kind of volume: %v", err)
	}
}
