package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestRead(t *testing.T) {
	type conf struct {
		Name  string        `yaml:"name"`
		Limit time.Duration `yaml:"limit"`
	}
	for name, tc := range map[string]struct{ in, want string }{
		"plain":           {"name: a\nlimit: 60s\n", ""},
		"unknown field":   {"name: a\ncolour: b\n", "colour"},
		"duplicate":       {"name: a\nname: b\n", "name"},
		"second document": {"name: a\n---\nname: b\n", "second document"},
		"wrong type":      {"limit: never\n", "duration"},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "c.yaml")
			if err := os.WriteFile(file, []byte(tc.in), 0o600); err != nil {
				t.Fatal(err)
			}
			c := conf{Limit: time.Second}
			err := Read(file, &c)
			if tc.want == "" {
				if err != nil || c.Name != "a" || c.Limit != time.Minute {
					t.Fatalf("%+v, %v", c, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want a mention of %q", err, tc.want)
			}
		})
	}
}
