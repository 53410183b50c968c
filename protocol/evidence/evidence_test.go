package evidence

import (
	"testing"

	"foothold/protocol/digest"
)

// The labels keep roles and kinds of binding apart, and each argument counts.
func TestBindingsDiffer(t *testing.T) {
	d1, d2 := digest.Of([]byte("1")), digest.Of([]byte("2"))
	n1, n2 := []byte("n1"), []byte("n2")
	all := []digest.SHA256{
		Binding(RoleBoot, "r", d1, d2, n1),
		Binding(RoleUnlock, "r", d1, d2, n1),
		Binding(RoleBoot, "s", d1, d2, n1),
		Binding(RoleBoot, "r", d2, d2, n1),
		Binding(RoleBoot, "r", d1, d1, n1),
		Binding(RoleBoot, "r", d1, d2, n2),
		StaticBinding(RoleBoot, "r", d1, n1),
		StaticBinding(RoleUnlock, "r", d1, n1),
		StaticBinding(RoleUnlock, "r", d2, n1),
		SurveyBinding("r", n1),
		SurveyBinding("s", n1),
		SurveyBinding("r", n2),
		Tunnel(d1, []byte("a"), []byte("b"), []byte("c")),
		Tunnel(d1, []byte("ab"), nil, []byte("c")),
		Tunnel(d2, []byte("a"), []byte("b"), []byte("c")),
		Tunnel(d1, []byte("b"), []byte("a"), []byte("c")),
		Tunnel(d1, []byte("a"), []byte("b"), []byte("d")),
	}
	seen := map[digest.SHA256]int{}
	for i, d := range all {
		if j, ok := seen[d]; ok {
			t.Errorf("%d and %d are equal", i, j)
		}
		seen[d] = i
	}
}
