package bundle

import (
	"bytes"
	"io"
	"testing"

	"github.com/cavaliergopher/cpio"
)

func TestArchiveIsReadableAndDeterministic(t *testing.T) {
	files := []File{{UniquePath, []byte(`{"a":1}`)}, {PrivateKeyPath, bytes.Repeat([]byte{7}, 32)}}
	a, err := Archive(files...)
	if err != nil {
		t.Fatal(err)
	}
	b, _ := Archive(files...)
	if !bytes.Equal(a, b) {
		t.Fatal("two archives of the same files differ")
	}
	if len(a)%4 != 0 {
		t.Fatalf("length %d is not padded: the next archive would be misread", len(a))
	}
	r := cpio.NewReader(bytes.NewReader(a))
	got := map[string][]byte{}
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got[h.Name], _ = io.ReadAll(r)
	}
	for _, f := range files {
		if !bytes.Equal(got[f.Path], f.Data) {
			t.Errorf("%s: got %q", f.Path, got[f.Path])
		}
	}
}
