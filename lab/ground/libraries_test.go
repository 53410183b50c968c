package ground

import (
	"slices"
	"testing"
)

func TestLibraries(t *testing.T) {
	got, err := libraries([]byte("\tlinux-vdso.so.1 (0x00007ffd)\n\tlibz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x00007f)\n" +
		"\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007e)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007d)\n"))
	want := []string{"/lib/x86_64-linux-gnu/libc.so.6", "/lib/x86_64-linux-gnu/libz.so.1", "/lib64/ld-linux-x86-64.so.2"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v", got, err)
	}
	for _, bad := range []string{"\tlibz.so.1 => not found\n", "\tnot a dynamic executable\n"} {
		if got, err := libraries([]byte(bad)); err == nil {
			t.Errorf("%q gives %v", bad, got)
		}
	}
}
