package measure

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"foothold/protocol/imalog"
	"foothold/protocol/tcglog"
)

func TestLogsAreWholeOrAnError(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, size int) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	firmware, kernel := file("firmware", tcglog.MaxSize), file("kernel", imalog.MaxSize)
	p, err := Logs{firmware, kernel}.Read()
	if err != nil || len(p.Firmware) != tcglog.MaxSize || len(p.Kernel) != imalog.MaxSize {
		t.Errorf("logs as large as may be: %d and %d bytes, %v", len(p.Firmware), len(p.Kernel), err)
	}
	for name, c := range map[string]struct{ firmware, kernel, want string }{
		"large firmware log": {file("large", tcglog.MaxSize+1), kernel, "more than"},
		"large kernel list":  {firmware, file("larger", imalog.MaxSize+1), "more than"},
		"empty firmware log": {file("empty", 0), kernel, "is empty"},
		"empty kernel list":  {firmware, file("empty", 0), "is empty"},
		"no firmware log":    {filepath.Join(dir, "none"), kernel, "securityfs"},
		"no kernel list":     {firmware, filepath.Join(dir, "none"), "ima_policy"},
	} {
		p, err := Logs{c.firmware, c.kernel}.Read()
		if err == nil || !strings.Contains(err.Error(), c.want) || p.Firmware != nil || p.Kernel != nil {
			t.Errorf("%s: %d and %d bytes, %v", name, len(p.Firmware), len(p.Kernel), err)
		}
	}
}
