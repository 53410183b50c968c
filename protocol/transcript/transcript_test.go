package transcript

import (
	"encoding/hex"
	"testing"

	"pgregory.net/rapid"
)

func TestSumIsPinned(t *testing.T) {
	got := Sum("foothold/test/v1", []byte("a"), nil, []byte("bc"))
	const want = "bb515dbf36071683e24632716bb424db0ae1e26cd9b0b16d71bc7ab3e4935584"
	if hex.EncodeToString(got[:]) != want {
		t.Fatalf("Sum = %x, want %s: the transcript's format is part of the protocol", got, want)
	}
}

// Moving a byte between neighbouring fields, or splitting one, changes the transcript.
func TestFieldBoundariesCount(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := rapid.SliceOf(rapid.Byte()).Draw(t, "a")
		b := rapid.SliceOf(rapid.Byte()).Draw(t, "b")
		joined := Sum("l", append(append([]byte{}, a...), b...))
		if joined == Sum("l", a, b) {
			t.Fatalf("one field and two fields with the same bytes share a digest")
		}
	})
}
