package event

import (
	"go/ast"
	"go/parser"
	"go/token"
	"strconv"
	"testing"
)

// TestEveryReasonIsExplained reads the declarations, so that a new reason cannot be
// forgotten.
func TestEveryReasonIsExplained(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "reason.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	table := Explanations()
	n := 0
	ast.Inspect(file, func(node ast.Node) bool {
		spec, ok := node.(*ast.ValueSpec)
		if !ok {
			return true
		}
		for _, v := range spec.Values {
			lit, ok := v.(*ast.BasicLit)
			if !ok {
				continue
			}
			text, err := strconv.Unquote(lit.Value)
			if err != nil {
				t.Fatal(err)
			}
			n++
			if e := table[Reason(text)]; e.Cause == "" || e.Next == "" {
				t.Errorf("%s has no explanation", text)
			}
		}
		return true
	})
	if n != len(table) || n < 40 {
		t.Errorf("%d reasons, %d explanations", n, len(table))
	}
	if e := Explain("never-heard-of"); e.Cause == "" || e.Next == "" {
		t.Error("an unknown reason has no general explanation")
	}
}
