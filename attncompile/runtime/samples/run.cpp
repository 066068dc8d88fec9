// Loads OUT/ with plain ONNX Runtime and runs it once on zeros: `run OUT`, or `run OUT --cpu`, which runs the portable
// model through its function bodies. Dynamic sizes are taken for 1. Prints the first output's sizes and sum.
//   g++ -std=c++17 run.cpp -I INCLUDE -L LIB -lonnxruntime -o run
#include <onnxruntime_cxx_api.h>

#include <iostream>
#include <string>
#include <vector>

static void run(const std::string& out, bool cpu) {
    Ort::Env env;
    Ort::SessionOptions options;
    if (!cpu) {
        options.AddConfigEntry("attncompile.strict_norms", "1");  // as below: else before 1.27 the library may refuse
        options.RegisterCustomOpsLibrary((out + "/libattncompile_ort.so").c_str());
        const OrtApi& api = Ort::GetApi();
        OrtCUDAProviderOptionsV2* cuda = nullptr;
        Ort::ThrowOnError(api.CreateCUDAProviderOptions(&cuda));
        const char* key = "enable_skip_layer_norm_strict_mode";  // before 1.27: norms of sums in fp16 add up in float32
        const char* value = "1";
        Ort::ThrowOnError(api.UpdateCUDAProviderOptions(cuda, &key, &value, 1));
        options.AppendExecutionProvider_CUDA_V2(*cuda);
        api.ReleaseCUDAProviderOptions(cuda);
    }
    const std::string model = out + (cpu ? "/model.onnx" : "/model.onnxruntime-cuda.onnx");
    Ort::Session session(env, model.c_str(), options);

    Ort::AllocatorWithDefaultOptions allocator;
    std::vector<std::string> names;
    std::vector<const char*> inputs;
    std::vector<Ort::Value> values;
    std::vector<std::vector<char>> zeros;
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    for (size_t i = 0; i < session.GetInputCount(); ++i) {
        const auto type = session.GetInputTypeInfo(i);
        const auto info = type.GetTensorTypeAndShapeInfo();
        auto sizes = info.GetShape();
        size_t bytes = 16;  // no element type is larger
        for (auto& size : sizes) bytes *= size = size < 1 ? 1 : size;
        zeros.emplace_back(bytes);
        values.push_back(Ort::Value::CreateTensor(
            memory, zeros.back().data(), bytes, sizes.data(), sizes.size(), info.GetElementType()));
        names.emplace_back(session.GetInputNameAllocated(i, allocator).get());
    }
    for (const auto& name : names) inputs.push_back(name.c_str());
    const auto output = session.GetOutputNameAllocated(0, allocator);
    const char* outputs[] = {output.get()};
    const auto found = session.Run(Ort::RunOptions(), inputs.data(), values.data(), values.size(), outputs, 1);

    const auto info = found[0].GetTensorTypeAndShapeInfo();
    for (const auto size : info.GetShape()) std::cout << size << ' ';
    if (info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
        double sum = 0;
        for (size_t i = 0; i < info.GetElementCount(); ++i) sum += found[0].GetTensorData<float>()[i];
        std::cout << "sum " << sum;
    }
    std::cout << std::endl;
}

int main(int argc, char** argv) {
    if (argc < 2) {
        std::cerr << "error: no folder\nhint: run OUT [--cpu]" << std::endl;
        return 2;
    }
    try {
        run(argv[1], argc > 2 && std::string(argv[2]) == "--cpu");
    } catch (const Ort::Exception& problem) {
        std::cerr << "error: " << problem.what() << std::endl;
        return 1;
    }
    return 0;
}
